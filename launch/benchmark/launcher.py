"""Section ``launcher``: the time that a user waits for commands, in seconds."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from hfprune_launch.benchmark.results import Findings, Line
from hfprune_launch.benchmark.settings import Settings
from hfprune_launch.project import PROJECT

from hfprune_dist.checkpoints.families import ATTENTION
from hfprune_dist.config.load import load_config
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import resolve_models
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.stage import Stage

SWEEP, METHODS = PROJECT.packages["hfprune_launch"] / "sweep.py", PROJECT.configs / "methods"
CELLS, QUICK_CELLS = 1000, 100
FEW_CELLS = 4
INSTANT_S, RERUN_S = 0.4, 3.0
NORMS = ("input_layernorm", "post_attention_layernorm")
# Metrics that the table shows for each kind of artifact.
METRICS = {
    "prune": {"ratio_reached": 0.2, "parameters": 80, "intermediate_size": 8},
    "evaluate": {"fidelity": {"perplexity": 10.0, "kl": 0.5, "top1_agreement": 0.5}, "tasks": {}},
}


def measure_launcher(settings: Settings) -> Findings:
    """Measure medians over fresh processes; no command can be faster than the bare interpreter."""
    few, cells = settings.scratch / "few", settings.scratch / "many"
    count = QUICK_CELLS if settings.quick else CELLS
    small, large = _finished_sweep(few, FEW_CELLS), _finished_sweep(cells, count)
    rounds = settings.rounds
    return Findings(
        [
            Line("launcher", "the bare interpreter", _median_seconds([sys.executable, "-c", ""], rounds), "s"),
            Line("launcher", "sweep.py --help", _median_seconds(_command("--help"), rounds), "s", INSTANT_S),
            Line(
                "launcher",
                f"sweep.py --status, {FEW_CELLS} cells",
                _median_seconds([*small, "--status"], rounds),
                "s",
                INSTANT_S,
            ),
            Line(
                "launcher", f"a finished sweep of {count:,} cells again", _median_seconds(large, rounds), "s", RERUN_S
            ),
        ]
    )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, str(SWEEP), *arguments]


def _median_seconds(command: Sequence[str], rounds: int) -> float:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _finished_sweep(folder: Path, cells: int) -> list[str]:
    """Make a sweep of ``cells`` pruned cells of one small checkpoint, with all artifacts, and return its command."""
    folder.mkdir()
    _write_checkpoint(folder / "model")
    (folder / "text.txt").write_text("text", encoding="utf-8")
    config = {
        "models": ["model"],
        "aliases": {"model": {"path": "model"}},
        "ratios": [0.1 + 0.1 * number / cells for number in range(cells)],
        "methods": ["hfprune"],
        "calibration": {"path": "text.txt"},
        "recovery": {"path": "text.txt", "method": "none"},
        "evaluation": {"tasks": [], "fidelity": {"path": "text.txt"}},
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    store = Store(folder / "out" / "store")
    for stage in _plan(file, store).stages.values():
        _commit(store, stage)
    return _command("--config", str(file), "--out", str(folder / "out"))


def _plan(file: Path, store: Store) -> Plan:
    config = load_config([file], {})
    models = resolve_models(config, file.parent / "none", store.hashes, download=False)
    return build_plan(config, models, resolve_methods(config, METHODS), store.hashes)


def _commit(store: Store, stage: Stage) -> None:
    draft = store.handle(stage.id).open_draft()
    write_json(draft / "result.json", {})
    store.commit(stage, draft, {"metrics": METRICS.get(stage.kind, {}), "wall_time_s": 1.0})


def _write_checkpoint(folder: Path) -> None:
    """Write a minimal checkpoint with enough neurons for a thousand ratios; the sweep reads only headers."""
    import torch
    from safetensors.torch import save_file

    hidden_size, intermediate_size = 4, 2**16
    folder.mkdir()
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    write_json(
        folder / "config.json", {"model_type": "llama", "tie_word_embeddings": True, "num_attention_heads": 1, **sizes}
    )
    write_json(folder / "tokenizer.json", {})
    layer = "model.layers.0"
    mlp = f"{layer}.mlp"
    weights = {
        "model.embed_tokens.weight": torch.zeros(8, hidden_size),
        "model.norm.weight": torch.zeros(hidden_size),
        **{f"{layer}.{norm}.weight": torch.zeros(hidden_size) for norm in NORMS},
        **{f"{layer}.self_attn.{name}.weight": torch.zeros(hidden_size, hidden_size) for name in ATTENTION},
        f"{mlp}.gate_proj.weight": torch.zeros(intermediate_size, hidden_size),
        f"{mlp}.up_proj.weight": torch.zeros(intermediate_size, hidden_size),
        f"{mlp}.down_proj.weight": torch.zeros(hidden_size, intermediate_size),
    }
    save_file(weights, folder / "model.safetensors")

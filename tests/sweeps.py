"""Whole sweeps over tiny models, started as a user starts them."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from evaluations import CHOICE, write_task
from fork_server import forked
from ranks import ROOT, surroundings
from tiny import save_tiny, write_documents, write_pairs

from hfprune_dist.config.load import load_config
from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import resolve_models
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.hashing import FileHashes


def make_inputs(folder: Path) -> Path:
    """Make models, texts, an lm-eval task and a configuration that uses them; return the configuration's file."""
    save_tiny(folder / "alpha", "llama")
    save_tiny(folder / "beta", "qwen2")
    write_documents(folder / "calibration.jsonl")
    write_documents(folder / "heldout.jsonl", seed=7)
    write_pairs(folder / "pairs.jsonl")
    (folder / "tasks").mkdir()
    choices = [{"text": "ban der", "choices": ["kin", "gos t"], "label": number % 2} for number in range(6)]
    write_task(folder / "tasks", "tiny_choice", choices, **CHOICE)
    config = {
        "models": ["alpha", "beta"],
        "aliases": {"alpha": {"path": "alpha"}, "beta": {"path": "beta"}},
        "ratios": [0.1, 0.2],
        "methods": ["surgeon-uniform-block"],
        "calibration": {"path": "calibration.jsonl", "samples": 8, "sequence_length": 32, "shard_size": 1},
        "importance": {"dtype": "float32"},
        "recovery": {
            "objective": "labels",
            "path": "pairs.jsonl",
            "sequence_length": 320,
            "batch_size": 2,
            "max_steps": 4,
            "rank": 4,
            "alpha": 8,
            "dtype": "float32",
        },
        "evaluation": {
            "tasks": ["tiny_choice"],
            "include_path": "tasks",
            "dtype": "float32",
            "fidelity": {"path": "heldout.jsonl", "windows": 4, "sequence_length": 32},
        },
        "runtime": {"ranks": 2, "save_every_steps": 1},
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def planned(
    config_file: Path, *, device: str = "", own: Mapping[str, Method] | None = None, **overrides: object
) -> tuple[SweepConfig, Plan]:
    """Plan a sweep from a configuration, or with ``own`` methods; dots in keys are written as ``__``."""
    config = load_config([config_file], {key.replace("__", "."): value for key, value in overrides.items()})
    hashes = FileHashes(None)
    models = resolve_models(config, config_file.parent / "none", hashes, download=False)
    methods = own or resolve_methods(config, ROOT / "configs" / "methods")
    return config, build_plan(config, models, methods, hashes, device)


def command(config: Path, out: Path, *arguments: str) -> list[str]:
    script = [sys.executable, str(ROOT / "launch" / "sweep.py")]
    return [*script, "--config", str(config), "--out", str(out), *arguments]


def sweep(
    config: Path, out: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a sweep to its end in forks (fork_server.py), one thread per rank so that its bits can be compared."""
    return subprocess.run(
        forked(command(config, out, *arguments)),
        env={**surroundings(), "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def in_process(main: Callable[[Sequence[str]], int], *arguments: object) -> tuple[int, str, str]:
    """Run a command whose stages are all finished, or that refuses: (exit code, stdout, stderr)."""
    shown, said = io.StringIO(), io.StringIO()
    with redirect_stdout(shown), redirect_stderr(said):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return code, shown.getvalue(), said.getvalue()


def finish(
    config: Path, out: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a sweep that must succeed."""
    result = sweep(config, out, *arguments, environment=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def results(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def without_costs(row: dict[str, str]) -> dict[str, str]:
    """Return what two undisturbed sweeps have in common: everything but times and memory."""
    costs = ("own_time_s", "wall_time_s", "peak_memory_bytes")
    return {name: value for name, value in row.items() if name not in costs and not name.endswith("device_hours")}


def loaded_by_its_card(checkpoint: Path) -> dict[str, Any]:
    """Run the lines by which a checkpoint's card loads it, where its folder lies; return what they define."""
    (lines,) = re.findall(r"```python\n(.*?)```", (checkpoint / "README.md").read_text(), re.DOTALL)
    defined: dict[str, Any] = {}
    with chdir(checkpoint.parent):
        exec(lines, defined)
    return defined


def id_of(out: Path, stage: str) -> str:
    """Return the id of a stage, which is named by its kind and label."""
    stages = json.loads((out / "sweep.json").read_text())["stages"]
    return next(f"{s['kind']}/{s['fingerprint']}" for s in stages if f"{s['kind']} {s['label']}" == stage)


def artifacts(out: Path, kind: str) -> dict[str, bytes]:
    """Return every weight and score of one kind of stage, by artifact and file name."""
    folder = out / "store" / kind
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}

"""Plans of randomly drawn configurations."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.load import load_config
from hfprune_dist.config.method import Method
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.hashing import FileHashes


class Drawing:
    """Plans over two tiny models, with and without biases, whose identities are given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models = [self._model("plain", "llama"), self._model("biased", "qwen2")]
        for name in ("calibration", "held-out"):
            (folder / f"{name}.jsonl").write_text(json.dumps({"text": name, "body": name}) + "\n")
        (folder / "pairs.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
        (folder / "tasks").mkdir()
        (folder / "tasks" / "own.yaml").write_text("task: own\n")

    def _model(self, name: str, variant: str) -> ModelSource:
        checkpoint = open_checkpoint(save_tiny(self._folder / name, variant))
        return ModelSource(name, checkpoint, f"identity of {name}", name, "checkpoint")

    def plan(self, settings: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]]) -> Plan:
        """Return the plan for dotted settings, whose paths are relative to the folder, and for methods by name."""
        paths = {key: str(self._folder / value) for key, value in settings.items() if key.endswith("path") and value}
        config = load_config([], {**settings, **paths})
        parsed = {name: Method(**method) for name, method in methods.items()}
        return build_plan(config, self._models, parsed, FileHashes(None))


def draw(generator: random.Random) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Draw settings, and methods by name, each of which occasionally differs from its default."""
    choices: dict[str, list[Any]] = {
        "ratios": [[0.1], [0.05, 0.2], [0.125]],
        "seed": [1, 2**31],
        "calibration.path": ["calibration.jsonl"] * 3,
        "calibration.name": [None, "de"],
        "calibration.split": ["test"],
        "calibration.revision": ["abc"],
        "calibration.text_field": ["body"],
        "calibration.samples": [8, 512],
        "calibration.sequence_length": [8, 128],
        "calibration.micro_batch_size": [2, 4],
        "calibration.shard_size": [1, 8],
        "importance.criteria": [["activation"], ["random", "entropy"], ["surgeon", "magnitude", "fisher"]],
        "importance.dtype": ["float32"],
        "distillation.learning_rate": [1, 2e-3],
        "distillation.dropout": [0, 0.5],
        "distillation.rank": [8],
        "distillation.micro_batch_size": [2],
        "distillation.dtype": ["float32"],
        "recovery.method": ["none"],
        "recovery.path": ["pairs.jsonl"] * 3,
        "recovery.split": ["validation"],
        "recovery.instruction_field": ["question"],
        "recovery.samples": [None, 100],
        "recovery.sequence_length": [512],
        "recovery.epochs": [1, 2.5],
        "recovery.max_steps": [None, 7],
        "recovery.weight_decay": [1, 0.01],
        "recovery.warmup_steps": [3],
        "recovery.dtype": ["float32"],
        "evaluation.tasks": [[], ["piqa"]],
        "evaluation.include_path": ["tasks"],
        "evaluation.num_fewshot": [None, 5],
        "evaluation.add_bos_token": [False],
        "evaluation.apply_chat_template": [True],
        "evaluation.limit": [None, 10],
        "evaluation.batch_size": [1],
        "evaluation.dtype": ["float32"],
        "evaluation.fidelity.path": ["held-out.jsonl"] * 3,
        "evaluation.fidelity.windows": [3],
        "evaluation.fidelity.sequence_length": [64],
        "evaluation.fidelity.name": [None],
        "runtime.ranks": [3],
    }
    settings = {key: generator.choice(values) for key, values in choices.items() if generator.random() < 0.35}
    settings.setdefault("ratios", [0.1])
    return settings, {name: _draw_method(generator) for name in ("one", "other")[: generator.randint(1, 2)]}


def _draw_method(generator: random.Random) -> dict[str, Any]:
    method: dict[str, Any] = {"criterion": generator.choice(["entropy", "surgeon", "surgeon", "activation", "random"])}
    choices: dict[str, list[Any]] = {
        "allocation": ["global", "searched"],
        "floor": [1, 0.25, 0.3],
        "protect_first": [1],
        "protect_last": [1],
        "refit": ["dense", "layerwise", "block", "block"],
        "multiple_of": [2],
        "distill": [3],
    }
    method |= {key: generator.choice(values) for key, values in choices.items() if generator.random() < 0.4}
    return method

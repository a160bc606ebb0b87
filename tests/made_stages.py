"""Stages with valid settings, for tests that don't care which."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hfprune_dist.config.parameters import Parameters, parameters_of
from hfprune_dist.config.schema import EvaluationConfig, SweepConfig
from hfprune_dist.config.texts import CalibrationConfig, FidelityConfig
from hfprune_dist.config.training import Training, TrainingText
from hfprune_dist.store import claims
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Attempt, End, Ledger, report_failure
from hfprune_dist.store.claims import Claim
from hfprune_dist.store.stage import Input, Stage

SETTINGS: dict[str, dict[str, Any]] = {
    "importance": {"criteria": ["entropy"], "dtype": "float32", "add_bos_token": True, "seed": 0},
    "reference": {"dtype": "float32"},
    "prune": {"ratio": 0.2, "criterion": "entropy", "allocation": "uniform", "refit": "none", "multiple_of": 1},
    "recover": {"seed": 0},
    "evaluate": EvaluationConfig(tasks=[], dtype="float32").model_dump(exclude={"include_path", "fidelity"}),
    "efficiency": {
        "engine": None,
        "batch_sizes": [1],
        "prompt_tokens": [1],
        "new_tokens": 2,
        "repeats": 1,
        "dtype": "float32",
        "device": "a processor",
    },
    "answers": {"dtype": "float32", "seed": 0},
    "check": {"engines": ["vllm"]},
    "loraprune": {
        "seed": 0,
        "ratio": 0.2,
        "structures": ["neurons"],
        "multiple_of": 1,
        "tensor_parallel": 1,
        "protect_first": 0,
        "protect_last": 0,
    },
}
TEXTS = {
    "importance": ("calibration", CalibrationConfig),
    "answers": ("recovery", TrainingText),
    "recover": ("recovery", Training),
    "loraprune": ("recovery", Training),
    "reference": ("text", FidelityConfig),
}


@contextmanager
def being_made(store: Store, stage: Stage, **record: Any) -> Iterator[Path]:
    """Commit an artifact whose files are written to the folder that is yielded, as if its stage had run."""
    handle = store.handle(stage.id)
    had_work = handle.work.exists()
    with handle.claimed_briefly() as claim:
        assert claim is not None, handle.holder()
        draft = handle.open_draft(claim)
        yield draft
        handle.commit(stage, draft, {"metrics": {}, "config": SweepConfig().model_dump(mode="json"), **record}, claim)
    if not had_work:
        handle.discard_work()


def begun(store: Store, stage: Stage, **job: Any) -> Attempt:
    """Record the next attempt at a stage, as a launcher that holds its claim does."""
    with store.handle(stage.id).claimed_briefly() as claim:
        return Ledger(store).begin(stage, claim or Standing(), **job)  # type: ignore[arg-type]


class Standing:
    """A claim that another process of the test holds."""

    def require_held(self) -> None:
        pass


def failed(store: Store, stage: Stage, cause: str, message: str, rank: int = 0) -> End:
    """Record why a rank of the last attempt at a stage failed, or of a first one."""
    attempts = Ledger(store).attempts_at(stage.id) or [begun(store, stage)]
    end = End(cause, message, time.time(), rank)
    report_failure(attempts[-1].folder, end)
    return end


def taken_over(store: Store, stage: Stage) -> Claim:
    """Claim a stage whose holder is taken for dead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "_lives", lambda *_: False)
        claim = store.handle(stage.id).claim()
    assert isinstance(claim, Claim)
    return claim


class FakeBackend:
    """In place of ranks on this machine: what ``run`` does with a stage is for the test to say."""

    ranks = 1

    def __init__(self, store: Store, *_: object) -> None:
        self.store = store

    def run(self, stage: Stage, _on_heartbeat: object) -> End | None:
        raise AssertionError(f"{stage.kind} {stage.label} began")


def stage_of(
    kind: str,
    label: str,
    settings: Parameters | Mapping[str, Any] | None = None,
    inputs: Mapping[str, Input] | None = None,
) -> Stage:
    """Return a stage with these settings over valid ones; those that its kind lacks only tell it from others."""
    if isinstance(settings, Parameters):
        return Stage(kind, label, settings, inputs or {})
    fields = parameters_of(kind).model_fields
    given, inputs = dict(settings or {}), dict(inputs or {})
    others = {name: given.pop(name) for name in list(given) if name not in fields}
    if others:
        inputs["told apart by"] = Input(json.dumps(others, sort_keys=True, default=str), "nowhere")
    values = SETTINGS[kind] | given
    if kind in TEXTS:
        name, section = TEXTS[kind]
        text = values.get(name, None if kind == "reference" else {})
        if isinstance(text, dict):
            is_file = "dataset" not in text and "path" not in text and "mixture" not in text
            values[name] = section(**text, **({"path": "(file)"} if is_file else {}))
    return Stage(kind, label, parameters_of(kind)(**values), inputs)

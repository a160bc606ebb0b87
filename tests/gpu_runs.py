"""Helpers for tests on GPUs: larger models, long texts, and sweeps whose heartbeats are recorded."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from sweeps import command

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.kinds.memory import MARGIN, Planned, settings_of
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.machine import count_gpus

POLL_S = 0.5


def folder_of(variable: str) -> Path:
    """Return the folder that an environment variable names; without it, skip the test."""
    if variable not in os.environ:
        pytest.skip(f"needs a large model: {variable} names no folder")
    return Path(os.environ[variable])


def visible(count: int) -> dict[str, str]:
    """Return an environment in which only the first ``count`` GPUs of this test are visible."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = shown.split(",") if shown else [str(number) for number in range(count_gpus())]
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[:count])}


def write_config(folder: Path, assets: Path, model: Path, **sections: object) -> Path:
    """Write a sweep of one model on the demo's text, in windows of 1,024 tokens, without recovery or tasks."""
    texts = {name: _long_texts(assets, name, folder) for name in ("calibration", "heldout")}
    defaults: dict[str, dict[str, object]] = {
        "calibration": {"path": str(texts["calibration"]), "samples": 64, "sequence_length": 1024},
        "importance": {"dtype": "bfloat16"},
        "recovery": {"method": "none"},
        "evaluation": {"tasks": [], "fidelity": {"path": str(texts["heldout"]), "windows": 8, "sequence_length": 1024}},
    }
    config: dict[str, object] = {"models": ["model"], "aliases": {"model": {"path": str(model)}}, "ratios": [0.2]}
    config |= {"methods": ["hfprune"], **defaults, **sections}
    for name in defaults.keys() & sections.keys():
        config[name] = {**defaults[name], **sections[name]}  # type: ignore[dict-item]
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _long_texts(assets: Path, name: str, folder: Path) -> Path:
    """Write the demo's texts of one kind, drawn and joined until each is long enough for any window."""
    lines = (assets / "text" / f"{name}.jsonl").read_text().splitlines()
    texts, generator = [json.loads(line)["text"] for line in lines], random.Random(name)
    joined = ["\n\n".join(generator.sample(texts, 4)) for _ in range(400)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in joined))
    return file


@dataclass(frozen=True)
class Beat:
    """A heartbeat of a running stage."""

    phase: str
    at: float


def finish_watched(config: Path, out: Path, *arguments: str, environment: dict[str, str]) -> list[Beat]:
    """Run a sweep that must succeed, and look at its stages twice a second."""
    log = out.with_suffix(".log")
    beats: list[Beat] = []
    with log.open("w") as stream:
        running = subprocess.Popen(
            command(config, out, *arguments), env={**os.environ, **environment}, stdout=stream, stderr=stream
        )
        try:
            while running.poll() is None:
                beats += _beats(out)
                time.sleep(POLL_S)
        finally:
            running.terminate()
            running.wait()
    assert running.returncode == 0, log.read_text()[-3000:]
    return beats


def _beats(out: Path) -> Iterator[Beat]:
    store = Store(out / "store")
    for folder in sorted((out / "store" / "work").glob("*/*")):
        heartbeat = store.handle(f"{folder.parent.name}/{folder.name}").heartbeat()
        if heartbeat is not None:
            yield Beat(heartbeat.phase, heartbeat.updated)


def manifest_of(out: Path, kind: str) -> dict:
    """Return the manifest of the only artifact of a kind."""
    (file,) = (out / "store" / kind).glob("*/manifest.json")
    return json.loads(file.read_text())


def estimate_of(out: Path, model: Path, ranks: int) -> float:
    """Return the bytes that planning expects of each rank of the calibration pass, with sharded weights."""
    plan = Plan.from_json(json.loads((out / "sweep.json").read_text()))
    stage = next(found for found in plan.stages.values() if found.kind == "importance")
    need = settings_of(stage).need(Planned(stage, plan.stages, open_checkpoint(model), checkpointing=False))
    assert need is not None
    return need.on_each_gpu(ranks, whole=False) / MARGIN


def logs_of(out: Path) -> str:
    """Return everything that ranks and launchers have written."""
    files = [file for pattern in ("*.log", "*.out", "*.err") for file in out.rglob(pattern)]
    return "\n".join(file.read_text(errors="replace") for file in sorted(files))

"""The file that a backend writes to a stage's work folder, for the ranks that run launch/stage/run.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store.artifacts import STAGE_FILE, StageHandle
from hfprune_dist.store.atomic_files import read_record, write_json
from hfprune_dist.store.heartbeat import PROGRESS
from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class Provenance:
    """Settings and origin of a sweep's stages, passed on to their ranks."""

    runtime: RuntimeConfig
    config: Mapping[str, Any]  # the sweep's, as in every manifest
    code: Mapping[str, Any]  # provenance of the code, as in every manifest


@dataclass(frozen=True)
class StageFile:
    """The content of a ``stage.json``: a stage (``Stage.to_json``), the number of its attempt (1 for the first), its
    settings (as accepted by ``RuntimeConfig``), and ``config`` and ``code`` of its provenance.
    """

    stage: dict[str, Any]
    attempt: int
    runtime: dict[str, Any]
    config: dict[str, Any]
    code: dict[str, Any]


def write_stage_file(handle: StageHandle, stage: Stage, provenance: Provenance, attempt: int) -> None:
    """Write what the ranks need to know, and remove the heartbeat of earlier attempts."""
    handle.work.mkdir(parents=True, exist_ok=True)
    (handle.work / PROGRESS).unlink(missing_ok=True)
    runtime, config, code = provenance.runtime.model_dump(), dict(provenance.config), dict(provenance.code)
    write_json(handle.work / STAGE_FILE, asdict(StageFile(stage.to_json(), attempt, runtime, config, code)))


def find_stage_file(handle: StageHandle) -> StageFile | None:
    """Read what ``write_stage_file`` wrote; None if there is nothing that can be read."""
    return read_record(StageFile, handle.work / STAGE_FILE)

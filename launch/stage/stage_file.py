"""The file that a backend writes to a stage's work folder, for the ranks that run launch/stage/run.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store.artifacts import STAGE_FILE, StageHandle
from hfprune_dist.store.atomic_files import read_record, write_json
from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class Provenance:
    """Settings and origin of a sweep's stages, passed on to their ranks.

    Attributes:
        config: the sweep's resolved configuration, kept in every manifest.
        code: provenance of the code, kept in every manifest.
    """

    runtime: RuntimeConfig
    config: Mapping[str, Any]
    code: Mapping[str, Any]


@dataclass(frozen=True)
class StageFile:
    """The content of a ``stage.json``.

    Attributes:
        stage: the stage, as returned by ``Stage.to_json``.
        runtime: settings, as accepted by ``RuntimeConfig``.
        config, code: see ``Provenance``.
        attempt: number of the attempt, 1 for the first.
    """

    stage: dict[str, Any]
    runtime: dict[str, Any]
    config: dict[str, Any]
    code: dict[str, Any]
    attempt: int


def write_stage_file(handle: StageHandle, stage: Stage, provenance: Provenance, attempt: int) -> None:
    """Write what the ranks need to know, and remove the failures of earlier attempts."""
    handle.work.mkdir(parents=True, exist_ok=True)
    handle.clear_failures()
    content = StageFile(
        stage.to_json(), provenance.runtime.model_dump(), dict(provenance.config), dict(provenance.code), attempt
    )
    write_json(handle.work / STAGE_FILE, asdict(content))


def find_stage_file(handle: StageHandle) -> StageFile | None:
    """Read what ``write_stage_file`` wrote; None if there is nothing that can be read."""
    return read_record(StageFile, handle.work / STAGE_FILE)

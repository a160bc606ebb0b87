"""The file that a backend writes to a stage's work folder, for the ranks that run launch/stage/run.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import STAGE_FILE, Store
from hfprune_dist.store.atomic_files import read_record, write_json
from hfprune_dist.store.claims import Holder, try_claim
from hfprune_dist.store.heartbeat import clear_failures
from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class Provenance:
    """Where a sweep's stages come from.

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
        stage: as ``Stage.to_json`` gives it.
        runtime: settings, as ``RuntimeConfig`` takes them.
        config, code: see ``Provenance``.
        attempt: 1 for the first.
    """

    stage: dict[str, Any]
    runtime: dict[str, Any]
    config: dict[str, Any]
    code: dict[str, Any]
    attempt: int


def write_stage_file(store: Store, stage: Stage, provenance: Provenance, attempt: int) -> None:
    """Write what the ranks need to know; failures of earlier attempts are forgotten."""
    work = store.work(stage.id)
    work.mkdir(parents=True, exist_ok=True)
    clear_failures(work)
    content = StageFile(
        stage.to_json(), provenance.runtime.model_dump(), dict(provenance.config), dict(provenance.code), attempt
    )
    write_json(work / STAGE_FILE, asdict(content))


def find_stage_file(store: Store, stage_id: str) -> StageFile | None:
    """What ``write_stage_file`` wrote; None where there is nothing that can be read."""
    return read_record(StageFile, store.work(stage_id) / STAGE_FILE)


def read_stage_file(store: Store, stage_id: str) -> StageFile:
    """What ``write_stage_file`` wrote.

    Raises:
        UserError: where there is nothing that can be read.
    """
    content = find_stage_file(store, stage_id)
    if content is None:
        raise UserError(f"{store.work(stage_id)}: no {STAGE_FILE}; stages are laid out by launch/sweep.py")
    return content


def discard_finished_work(store: Store, stage: Stage) -> None:
    """Forget the progress of a stage that is done, of which a process that died at its very end left something."""
    work = store.work(stage.id)
    if not work.is_dir() or isinstance(claim := try_claim(work), Holder):
        return  # a process that has just committed is about to do the same
    try:
        if store.verify(stage.id).state == "done":
            store.discard_work(stage.id)
    finally:
        claim.release()


def attempts_so_far(store: Store, stage_id: str) -> int:
    """How often the local backend has laid a stage out in the work folder that is there now."""
    content = find_stage_file(store, stage_id)
    return 0 if content is None else content.attempt

"""What a backend leaves in a stage's work folder for the ranks that run launch/stage.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_dist.artifacts import Store
from hfprune_dist.claims import Holder, try_claim
from hfprune_dist.config import RuntimeConfig
from hfprune_dist.files import read_json, write_json
from hfprune_dist.plan import Stage
from hfprune_dist.progress import clear_failures

STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Origin:
    """Where a sweep's stages come from.

    Attributes:
        config: the sweep's resolved configuration, kept in every manifest.
        code: provenance of the code, kept in every manifest.
    """

    runtime: RuntimeConfig
    config: Mapping[str, Any]
    code: Mapping[str, Any]


def lay_out(store: Store, stage: Stage, origin: Origin, attempt: int) -> None:
    """Write what the ranks need to know; failures of earlier attempts are forgotten."""
    work = store.work(stage.id)
    work.mkdir(parents=True, exist_ok=True)
    clear_failures(work)
    record = {
        "stage": stage.to_json(),
        "runtime": origin.runtime.model_dump(),
        "config": dict(origin.config),
        "code": dict(origin.code),
        "attempt": attempt,
    }
    write_json(work / STAGE_FILE, record)


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
    record = read_json(store.work(stage_id) / STAGE_FILE)
    return 0 if record is None else int(record["attempt"])

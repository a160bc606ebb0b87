"""The limit on how many jobs of a sweep run at once (``--max-running``), enforced by Slurm without a launcher.

There are as many slots as jobs that may run at once. The jobs of a slot run one at a time: each starts when the one
before it is over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from hfprune_launch.slurm.attempts import JobAttempt


class Slot(NamedTuple):
    """A place for a job.

    Attributes:
        number: number of the slot; None if there is no limit.
        after_any: id of the job that has to be over first; None if there is none.
    """

    number: int | None
    after_any: str | None


def choose_slot(limit: int | None, live: Iterable[JobAttempt], after_ok: Collection[str]) -> Slot | None:
    """Choose the slot that a new job joins; None if the last jobs of all slots have ids that aren't known (yet).

    Args:
        limit: the most jobs that run at once; None for no limit.
        live: attempts whose jobs may be waiting or running.
        after_ok: ids of the jobs that the new one has to wait for in any case.
    """
    if limit is None:
        return Slot(None, None)
    last: dict[int, JobAttempt] = {}
    for attempt in sorted(live, key=_order):
        if attempt.intent.slot is not None:
            last[attempt.intent.slot] = attempt
    free = next((slot for slot in range(limit) if slot not in last), None)
    if free is not None:
        return Slot(free, None)
    # Behind a job that the new one has to wait for anyway, else behind the one that was submitted first.
    ids = {slot: job_id for slot in last if slot < limit and (job_id := last[slot].job_id) is not None}
    if not ids:
        return None
    slot = min(ids, key=lambda slot: (ids[slot] not in after_ok, *_order(last[slot])))
    return Slot(slot, ids[slot])


def _order(attempt: JobAttempt) -> tuple[float, float]:
    """Orders attempts as they were recorded; those of one launcher too, within a tick of the file system's clock."""
    return attempt.recorded_at, attempt.intent.created

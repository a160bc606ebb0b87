"""All known attempts at the stages of a sweep: those on this machine, and jobs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from heapq import merge
from pathlib import Path

from hfprune_launch.local import past_attempts as local
from hfprune_launch.local.logs import logs_below
from hfprune_launch.slurm import past_attempts as slurm
from hfprune_launch.slurm.slurm_stage import SlurmStage

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempt import Attempt, AttemptsOf
from hfprune_dist.store.stage import Stage


def past_attempts(out: Path) -> AttemptsOf:
    """Return a function from a stage to its known attempts, which reads a stage's records on the first call for it.

    Args:
        out: folder of the sweep.
    """
    store, logs = Store(out / "store"), cache(logs_below)
    read: dict[str, Sequence[Attempt]] = {}

    def of(stage: Stage) -> Sequence[Attempt]:
        if stage.id not in read:
            read[stage.id] = attempts_at(stage)
        return read[stage.id]

    def attempts_at(stage: Stage) -> Sequence[Attempt]:
        on_cluster = slurm.past_attempts(SlurmStage(store, stage.id))
        here = local.past_attempts(stage, store.handle(stage.id), logs(out / "logs"))
        # An artifact made by a job has a manifest too, which adds nothing to the job's own record.
        own = [it for it in here if it.logs or not on_cluster]
        # Each list keeps its order, whatever the clocks of nodes say.
        return list(merge(on_cluster, own, key=lambda it: it.started or it.ended or 0.0))

    return of

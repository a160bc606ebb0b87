"""Stages whose jobs may still begin, and what they read: none of it may be removed, even if no row names it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from hfprune_launch.slurm.attempts import Attempts, JobAttempt, with_job_ids
from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.whereabouts import Whereabouts
from hfprune_launch.stage.stage_file import find_stage_file

from hfprune_dist.store.artifacts import Store


def needs_of_jobs(store: Store) -> Mapping[str, list[str]]:
    """Id of each stage whose job may wait or run -> ids of the stages whose artifacts it reads."""
    submitted = {attempt.intent.stage_id for attempt in _attempts_that_go_on(store)}
    return {stage_id: _read_by(store, stage_id) for stage_id in sorted(submitted)}


def _attempts_that_go_on(store: Store) -> list[JobAttempt]:
    """Open attempts at any stage, except those whose jobs are over as Slurm says; all of them if it doesn't answer."""
    attempts = Attempts(store.root).open_attempts()
    if not attempts:
        return []
    whereabouts = Whereabouts(store, SlurmCommands(retry_delays_s=()), time.monotonic)
    try:
        whereabouts.look(with_job_ids(attempts))
    except SlurmUnavailableError:
        return attempts
    return [attempt for attempt in attempts if not whereabouts.sighting(attempt).is_over]


def _read_by(store: Store, stage_id: str) -> list[str]:
    """Ids of the stages that a submitted one reads; none if its file is lost, without which its job can't run."""
    content = find_stage_file(store.handle(stage_id))
    inputs = {} if content is None else content.stage.get("inputs", {})
    return [source["location"] for source in inputs.values() if source.get("is_stage")]

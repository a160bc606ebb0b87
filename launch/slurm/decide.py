"""What a launcher does next, from what the store and Slurm say: pure functions.

However they are called, no stage ever has two live jobs, no finished stage is submitted, and every open attempt ends.
A job runs a chain of stages, one after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from graphlib import TopologicalSorter
from itertools import groupby, pairwise

from hfprune_launch.slurm.causes import LAUNCH_FAILED, RETRIES
from hfprune_launch.slurm.commands import DEPENDENCY, FORGOTTEN, NEVER, JobInfo

# Seconds after a job's completion by which its artifact has to be visible here (file systems lag).
LAG_S = 60.0
# Reasons that occur in every queue, and why a job waits for others of ours.
ORDINARY = ("None", "Priority", "Resources", "BeginTime", "Prolog", "Cleaning", DEPENDENCY, NEVER)


@dataclass(frozen=True)
class StageState:
    """What the store and Slurm say about a stage.

    Attributes:
        needs: ids of the stages that it needs.
        serves: the rows that need it; of a pass through a dense model, the model. Stages of a job have the same.
        is_wanted: whether its artifact is missing, and results that are asked for need it.
        is_done: whether it has a verified artifact.
        has_attempt: whether it has an open attempt: queued, running, over, or about to be submitted by a launcher that
            may have died.
        has_id: whether the id of its job is recorded.
        job: what Slurm says of its job; None if it says nothing, or does not answer.
        lasts: seconds for which Slurm has said so.
        ends: causes of the attempts that ended while this command followed them.
    """

    stage_id: str
    needs: tuple[str, ...]
    serves: frozenset[str]
    is_wanted: bool
    is_done: bool
    has_attempt: bool = False
    has_id: bool = False
    job: JobInfo | None = None
    lasts: float = 0.0
    ends: tuple[str, ...] = ()


class Do(Enum):
    CLOSE = auto()
    """Record the end of an attempt."""
    SETTLE = auto()
    """The same, unless the stage's claim shows that its job lives, or that a launcher is submitting it."""
    CANCEL = auto()
    """Cancel a job that would wait for ever."""
    TELL = auto()
    """Say why a job does not go on."""


def about_job(state: StageState) -> tuple[Do, str] | None:
    """Return what to do about the job of an open attempt, and what to say."""
    job = state.job
    if not state.has_attempt:
        return None
    if job is None and not state.has_id:
        return Do.SETTLE, ""
    if job is None:
        return (Do.CLOSE, "") if state.is_done else (Do.TELL, "Slurm does not list it, and does not answer about it")
    if _cannot_start(job):
        return Do.CANCEL, ""
    if state.is_done and not job.is_waiting:
        return Do.CLOSE, ""  # its job may go on with other stages
    if job.is_live:
        is_stuck = job.is_waiting and job.reason not in ORDINARY
        return (Do.TELL, f"it can't start: {job.reason}") if is_stuck else None
    if job.state == "COMPLETED" and state.lasts < LAG_S:
        return None
    return (Do.SETTLE if job.state == FORGOTTEN else Do.CLOSE), ""


def _cannot_start(job: JobInfo) -> bool:
    return job.is_waiting and LAUNCH_FAILED.search(job.reason) is not None


def to_submit(states: Mapping[str, StageState], resources: Callable[[str], object]) -> list[list[str]]:
    """The jobs to submit, each after what it needs: chains of stages of the same rows and resources, in plan order."""
    groups: dict[frozenset[str], list[str]] = {}
    for stage_id in _submittable(states):
        groups.setdefault(states[stage_id].serves, []).append(stage_id)
    waiting: dict[str, set[str]] = {}
    for stage_id in (stage_id for group in groups.values() for stage_id in group):
        for need in states[stage_id].needs:
            waiting.setdefault(need, set()).add(stage_id)

    def parts(chain: list[str]) -> list[list[str]]:
        """Part a chain behind each stage for which another job waits; passes through a dense model stay together."""
        for number, (stage_id, following) in enumerate(pairwise(chain), 1):
            if states[following].needs and not waiting.get(stage_id, set()) <= {*chain}:
                return parts(chain[:number]) + parts(chain[number:])
        return [chain]

    alike = [list(chain) for group in groups.values() for _, chain in groupby(group, resources)]
    jobs = {part[0]: part for chain in alike for part in parts(chain)}
    first = {stage_id: part[0] for part in jobs.values() for stage_id in part}
    waits = {
        name: {first[need] for each in part for need in states[each].needs if need in first} - {name}
        for name, part in jobs.items()
    }
    return [jobs[name] for name in TopologicalSorter(waits).static_order()]


def _submittable(states: Mapping[str, StageState]) -> list[str]:
    """Return the stages that need a job, if what they need is done or has one."""
    found: list[str] = []
    has_job = {name for name, each in states.items() if each.job and each.job.is_live and not _cannot_start(each.job)}
    for state in states.values():
        has_needs = all(states[need].is_done or need in has_job for need in state.needs)
        may_try = all(count <= RETRIES.get(cause, 0) for cause, count in Counter(state.ends).items())
        if state.is_wanted and not (state.is_done or state.has_attempt) and has_needs and may_try:
            found.append(state.stage_id)
            has_job.add(state.stage_id)
    return found

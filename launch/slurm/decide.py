"""What a launcher does next, from what the store and Slurm say: pure functions.

However they are called, no stage ever has two live jobs, no finished stage is submitted, and every open attempt ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from hfprune_launch.slurm.causes import LAUNCH_FAILED, RETRIES
from hfprune_launch.slurm.commands import DEPENDENCY, FORGOTTEN, NEVER, JobInfo

# Seconds after a job's completion by which its artifact has to be visible here (file systems lag).
LAG_S = 60.0
# Reasons that occur in every queue, of interest only if the wait is long.
ORDINARY = ("None", "Priority", "Resources", "BeginTime", "Prolog", "Cleaning")
LONG_WAIT_S = 300.0


@dataclass(frozen=True)
class StageState:
    """What the store and Slurm say about a stage.

    Attributes:
        needs: ids of the stages that it needs.
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


class Action(NamedTuple):
    """What to do about a stage's job, and for ``TELL`` what to say."""

    do: Do
    stage_id: str
    message: str = ""


def about_jobs(states: Mapping[str, StageState]) -> list[Action]:
    """Return what to do about the jobs of open attempts."""
    return [action for state in states.values() if (action := _about(state)) is not None]


def _about(state: StageState) -> Action | None:
    def do(what: Do, message: str = "") -> Action:
        return Action(what, state.stage_id, message)

    job = state.job
    if not state.has_attempt:
        return None
    if job is None and not state.has_id:
        return do(Do.SETTLE)
    if job is None:
        return do(Do.CLOSE) if state.is_done else do(Do.TELL, "Slurm does not list it, and does not answer about it")
    if _can_not_start(job):
        return do(Do.CANCEL)
    if job.is_live:
        return do(Do.TELL, f"it can't start: {job.reason}") if job.is_waiting and _is_stuck(job, state.lasts) else None
    if state.is_done:
        return do(Do.CLOSE)
    if job.state == "COMPLETED" and state.lasts < LAG_S:
        return None
    return do(Do.SETTLE if job.state == FORGOTTEN else Do.CLOSE)


def _can_not_start(job: JobInfo) -> bool:
    """Return whether Slurm will never start a job."""
    return job.is_waiting and LAUNCH_FAILED.search(job.reason) is not None


def _is_stuck(job: JobInfo, waited_s: float) -> bool:
    if job.reason in (DEPENDENCY, NEVER):
        return False
    return job.reason not in ORDINARY or waited_s >= LONG_WAIT_S


def to_submit(states: Mapping[str, StageState]) -> list[str]:
    """Return the stages to submit, each after those that it needs, which are done or have jobs.

    Args:
        states: of all stages, in plan order.
    """
    found: list[str] = []
    has_job = {
        state.stage_id for state in states.values() if (job := state.job) and job.is_live and not _can_not_start(job)
    }
    for state in states.values():
        has_needs = all(states[need].is_done or need in has_job for need in state.needs)
        if state.is_wanted and not (state.is_done or state.has_attempt) and has_needs and _may_try(state):
            found.append(state.stage_id)
            has_job.add(state.stage_id)
    return found


def _may_try(state: StageState) -> bool:
    return all(count <= RETRIES.get(cause, 0) for cause, count in Counter(state.ends).items())


def job_to_wait_for(max_running: int | None, live: Sequence[str]) -> str | None:
    """Return the job that has to be over before a new one starts, so that Slurm itself runs no more than a number of
    jobs at once, without a launcher: the jobs form that many rows, in each of which they run one after another.

    Args:
        live: ids of the store's jobs that wait or run, in the order of their submission.
    """
    return live[-max_running] if max_running is not None and len(live) >= max_running else None

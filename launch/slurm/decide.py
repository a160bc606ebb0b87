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
from hfprune_launch.slurm.commands import DEPENDENCY, NEVER

# Seconds after a job's completion by which its artifact has to be visible here (file systems lag).
LAG_S = 60.0
# Reasons that occur in every queue, of interest only if the wait is long.
ORDINARY = ("None", "Priority", "Resources", "BeginTime", "Prolog", "Cleaning")
LONG_WAIT_S = 300.0


class Sight(Enum):
    """What is seen of the job of a stage's open attempt."""

    NO_ATTEMPT = auto()
    INTENDED = auto()
    """An intent; its launcher is about to submit it, or has died. Slurm lists no job of its name."""
    WAITS = auto()
    RUNS = auto()
    COMPLETED = auto()
    ENDED = auto()
    FORGOTTEN = auto()
    """Slurm says that there is no such job (any more)."""
    UNKNOWN = auto()
    """Slurm does not list it, and does not answer about it."""


@dataclass(frozen=True)
class StageState:
    """What the store and Slurm say about a stage.

    Attributes:
        needs: ids of the stages that it needs.
        is_wanted: whether its artifact is missing, and results that are asked for need it.
        is_done: whether it has a verified artifact.
        reason: why its job waits, in Slurm's words.
        lasts: seconds for which this has been seen of the job.
        ends: causes of the attempts that ended while this command followed them.
    """

    stage_id: str
    needs: tuple[str, ...]
    is_wanted: bool
    is_done: bool
    sight: Sight = Sight.NO_ATTEMPT
    reason: str = ""
    lasts: float = 0.0
    ends: tuple[str, ...] = ()

    @property
    def can_not_start(self) -> bool:
        """Whether Slurm will never start its job."""
        return self.sight is Sight.WAITS and LAUNCH_FAILED.search(self.reason) is not None


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
    match state.sight:
        case Sight.WAITS if state.can_not_start:
            return Action(Do.CANCEL, state.stage_id)
        case Sight.WAITS if _is_worth_telling(state):
            return Action(Do.TELL, state.stage_id, f"it can't start: {state.reason}")
        case Sight.COMPLETED if not state.is_done and state.lasts < LAG_S:
            return None
        case Sight.COMPLETED | Sight.ENDED:
            return Action(Do.CLOSE, state.stage_id)
        case Sight.FORGOTTEN | Sight.UNKNOWN if state.is_done:
            return Action(Do.CLOSE, state.stage_id)
        case Sight.FORGOTTEN | Sight.INTENDED:
            return Action(Do.SETTLE, state.stage_id)
        case Sight.UNKNOWN:
            return Action(Do.TELL, state.stage_id, "Slurm does not list it, and does not answer about it")
    return None


def _is_worth_telling(state: StageState) -> bool:
    if state.reason in (DEPENDENCY, NEVER):
        return False
    return state.reason not in ORDINARY or state.lasts >= LONG_WAIT_S


def to_submit(states: Mapping[str, StageState]) -> list[str]:
    """Return the stages to submit, each after those that it needs, which are done or have jobs.

    Args:
        states: of all stages, in plan order.
    """
    found: list[str] = []
    has_job = {it.stage_id for it in states.values() if it.sight in (Sight.WAITS, Sight.RUNS) and not it.can_not_start}
    for state in states.values():
        has_needs = all(states[need].is_done or need in has_job for need in state.needs)
        if state.sight is Sight.NO_ATTEMPT and state.is_wanted and not state.is_done and has_needs and _may_try(state):
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

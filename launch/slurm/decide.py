"""What a launcher does next, from what the store and Slurm say: pure functions.

However they are called, no stage ever has two live jobs, no finished stage is submitted, and every open attempt ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from hfprune_launch.slurm.causes import LAUNCH_FAILED, RETRIES
from hfprune_launch.slurm.commands import DEPENDENCY, NEVER

# Seconds for which a job must have been unknown, without a sign of life, before it counts as gone.
GONE_AFTER_S = 180.0
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
    MISSING = auto()
    """It has an id that Slurm does not list, or does not answer about."""


@dataclass(frozen=True)
class StageState:
    """What the store and Slurm say about a stage.

    Attributes:
        needs: ids of the stages that it needs.
        is_wanted: whether its artifact is missing, and results that are asked for need it.
        is_done: whether it has a verified artifact.
        has_id: whether the job's id is recorded.
        reason: why its job waits, in Slurm's words.
        lasts: seconds for which this has been seen of the job.
        said_end: whether the job's last start recorded an end after which it is not requeued.
        ends: causes of the attempts that ended while this command followed them.
    """

    stage_id: str
    needs: tuple[str, ...]
    is_wanted: bool
    is_done: bool
    sight: Sight = Sight.NO_ATTEMPT
    has_id: bool = False
    reason: str = ""
    lasts: float = 0.0
    said_end: bool = False
    ends: tuple[str, ...] = ()


class Do(Enum):
    ADOPT = auto()
    """Record the id of a job that was found by its name."""
    CLOSE = auto()
    """Record the end of an attempt."""
    CLOSE_UNLESS_CLAIMED = auto()
    """The same, unless the stage's claim shows that its job lives."""
    SETTLE = auto()
    """Make sure that an intent came to nothing, unless its launcher is still at it; then record the end."""
    CANCEL = auto()
    """Cancel a job that would wait for ever."""
    SUBMIT = auto()
    TELL = auto()


class Action(NamedTuple):
    """What to do about a stage, and for ``TELL`` what to say."""

    do: Do
    stage_id: str
    message: str = ""


def decide(states: Mapping[str, StageState]) -> list[Action]:
    """Return what to do, in an order in which it can be done.

    Args:
        states: of all stages, in plan order: each comes after those that it needs.
    """
    actions: list[Action] = []
    live: set[str] = set()
    for state in states.values():
        if state.sight is Sight.NO_ATTEMPT:
            has_needs = all(states[need].is_done or need in live for need in state.needs)
            if state.is_wanted and not state.is_done and has_needs and _may_try(state):
                actions.append(Action(Do.SUBMIT, state.stage_id))
                live.add(state.stage_id)
            continue
        about_its_job = _about_its_job(state)
        actions += about_its_job
        if state.sight in (Sight.WAITS, Sight.RUNS) and Do.CANCEL not in (action.do for action in about_its_job):
            live.add(state.stage_id)
    return actions


def _may_try(state: StageState) -> bool:
    return all(count <= RETRIES.get(cause, 0) for cause, count in Counter(state.ends).items())


def _about_its_job(state: StageState) -> list[Action]:
    """Return what to do about a stage that has an open attempt."""

    def do(what: Do, message: str = "") -> list[Action]:
        return [Action(what, state.stage_id, message)]

    adopted = [] if state.has_id else do(Do.ADOPT)
    match state.sight:
        case Sight.WAITS if LAUNCH_FAILED.search(state.reason):  # Slurm will never start it
            return adopted + do(Do.CANCEL)
        case Sight.WAITS:
            return adopted + (do(Do.TELL, f"it can't start: {state.reason}") if _is_worth_telling(state) else [])
        case Sight.RUNS:
            return adopted
        case Sight.COMPLETED if not state.is_done and state.lasts < LAG_S:
            return adopted
        case Sight.COMPLETED | Sight.ENDED:
            return adopted + do(Do.CLOSE)
        case Sight.MISSING if state.is_done:
            return do(Do.CLOSE)
        case Sight.MISSING if state.said_end or state.lasts >= GONE_AFTER_S:
            return do(Do.CLOSE_UNLESS_CLAIMED)
        case Sight.MISSING:
            minutes = f"{GONE_AFTER_S / 60:.0f} min"
            return do(Do.TELL, f"Slurm says nothing of it; it counts as gone after {minutes} without a sign of life")
        case Sight.INTENDED:
            return do(Do.SETTLE)
    return []


def _is_worth_telling(state: StageState) -> bool:
    if state.reason in (DEPENDENCY, NEVER):
        return False
    return state.reason not in ORDINARY or state.lasts >= LONG_WAIT_S


class InSlot(NamedTuple):
    """A live attempt that has a slot.

    Attributes:
        joined: unix time at which the attempt was recorded.
        job_id: None if it isn't known (yet).
    """

    slot: int
    joined: float
    job_id: str | None


def choose_slot(limit: int, live: Sequence[InSlot], after_ok: Collection[str]) -> tuple[int, str | None] | None:
    """Choose the slot that a new job joins (``--max-running``). The jobs of a slot run one after another, so that Slurm
    enforces the limit without a launcher.

    Args:
        limit: the most jobs that run at once.
        after_ok: ids of the jobs that the new one has to wait for in any case.

    Returns:
        the slot's number, and the id of the job that has to be over first, if any; None if the last jobs of all slots
        have ids that aren't known (yet).
    """
    last = {attempt.slot: attempt for attempt in sorted(live, key=lambda attempt: attempt.joined)}
    free = next((number for number in range(limit) if number not in last), None)
    if free is not None:
        return free, None
    # Behind a job that the new one has to wait for anyway, else behind the one that was submitted first.
    known = [attempt for number, attempt in last.items() if number < limit and attempt.job_id is not None]
    before = min(known, key=lambda attempt: (attempt.job_id not in after_ok, attempt.joined), default=None)
    return None if before is None else (before.slot, before.job_id)

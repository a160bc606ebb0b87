"""What a launcher decides, over all that the store and Slurm may say."""

from dataclasses import replace

import pytest
from hfprune_launch.slurm.causes import RETRIES, Cause
from hfprune_launch.slurm.decide import GONE_AFTER_S, LAG_S, Do, InSlot, Sight, StageState, choose_slot, decide
from hypothesis import given, settings
from hypothesis import strategies as st

HELD = "launch failed requeued held"
REASONS = ["None", "Priority", "Dependency", "DependencyNeverSatisfied", "PartitionDown", "JobHeldUser", HELD]
CLOSES = {Do.CLOSE, Do.CLOSE_UNLESS_CLAIMED, Do.SETTLE}


@st.composite
def sweeps(draw):
    """The states of stages of which each may need any of those before it."""
    states = {}
    for number in range(draw(st.integers(1, 5))):
        needs = tuple(draw(st.sets(st.sampled_from(sorted(states))))) if states else ()
        is_done = draw(st.booleans())
        states[str(number)] = StageState(
            str(number),
            needs,
            is_wanted=not is_done and draw(st.booleans()),
            is_done=is_done,
            sight=draw(st.sampled_from(Sight)),
            has_id=draw(st.booleans()),
            reason=draw(st.sampled_from(REASONS)),
            lasts=draw(st.sampled_from([0.0, 59.0, 61.0, 200.0, 9000.0])),
            said_end=draw(st.booleans()),
            ends=tuple(draw(st.lists(st.sampled_from(Cause), max_size=4))),
        )
    return states


@settings(max_examples=150)
@given(sweeps())
def test_no_two_jobs_of_a_stage_and_none_of_a_finished_one(states):
    actions = decide(states)
    submitted = [action.stage_id for action in actions if action.do is Do.SUBMIT]
    assert len(set(submitted)) == len(submitted)
    cancelled = {action.stage_id for action in actions if action.do is Do.CANCEL}
    for stage_id in submitted:
        state = states[stage_id]
        assert state.sight is Sight.NO_ATTEMPT and state.is_wanted and not state.is_done
        assert all(state.ends.count(cause) <= RETRIES.get(cause, 0) for cause in state.ends)
        for need in state.needs:  # which Slurm is told of, as the new job depends on it
            runs = states[need].sight in (Sight.WAITS, Sight.RUNS) and need not in cancelled
            assert states[need].is_done or runs or need in submitted[: submitted.index(stage_id)]
    for action in actions:
        state = states[action.stage_id]
        assert not (action.do in CLOSES and state.sight in (Sight.WAITS, Sight.RUNS)), "it lives"
        assert action.do is not Do.CANCEL or state.sight is Sight.WAITS


STATE = StageState("a", (), is_wanted=True, is_done=False, has_id=True)
DONE = {"is_wanted": False, "is_done": True}


@pytest.mark.parametrize(
    ("seen", "does"),
    [
        ({}, [Do.SUBMIT]),
        ({"is_wanted": False}, []),
        ({"ends": (Cause.KILLED,) * 2}, [Do.SUBMIT]),
        ({"ends": (Cause.KILLED,) * 3}, []),
        ({"ends": (Cause.BAD_NODE,) * 6}, []),
        ({"ends": (Cause.CANCELLED,)}, []),
        ({"ends": (Cause.INTERRUPTED,) * 50 + (Cause.KILLED,)}, [Do.SUBMIT]),
        ({"sight": Sight.RUNS, "has_id": False}, [Do.ADOPT]),
        ({"sight": Sight.COMPLETED}, []),
        ({"sight": Sight.COMPLETED, "lasts": LAG_S}, [Do.CLOSE]),
        ({"sight": Sight.COMPLETED, **DONE}, [Do.CLOSE]),
        ({"sight": Sight.ENDED}, [Do.CLOSE]),
        ({"sight": Sight.MISSING}, [Do.TELL]),
        ({"sight": Sight.MISSING, "said_end": True}, [Do.CLOSE_UNLESS_CLAIMED]),
        ({"sight": Sight.MISSING, "lasts": GONE_AFTER_S}, [Do.CLOSE_UNLESS_CLAIMED]),
        ({"sight": Sight.MISSING, **DONE}, [Do.CLOSE]),
        ({"sight": Sight.INTENDED}, [Do.SETTLE]),
        ({"sight": Sight.WAITS, "reason": "Priority"}, []),
        ({"sight": Sight.WAITS, "reason": "Priority", "lasts": 300.0}, [Do.TELL]),
        ({"sight": Sight.WAITS, "reason": "PartitionDown"}, [Do.TELL]),
        ({"sight": Sight.WAITS, "reason": "JobHeldUser", "lasts": 1e6}, [Do.TELL]),
        ({"sight": Sight.WAITS, "reason": "Dependency", "lasts": 1e6}, []),
        ({"sight": Sight.WAITS, "reason": "DependencyNeverSatisfied"}, []),
        ({"sight": Sight.WAITS, "reason": HELD}, [Do.CANCEL]),
        ({"sight": Sight.RUNS, "reason": HELD}, []),
    ],
)
def test_what_is_done(seen, does):
    assert [action.do for action in decide({"a": replace(STATE, **seen)})] == does


def in_slot(number, joined, job_id):
    return InSlot(number, joined, job_id)


def test_a_job_joins_the_first_free_slot_or_the_one_whose_last_job_was_submitted_first():
    assert choose_slot(2, [], ()) == (0, None)
    assert choose_slot(3, [in_slot(2, 1.0, "a"), in_slot(0, 2.0, "b")], {"a"}) == (1, None)
    live = [in_slot(0, 1.0, "a"), in_slot(1, 2.0, "b"), in_slot(0, 3.0, "c"), in_slot(1, 4.0, "d")]
    for order in (1, -1):
        assert choose_slot(2, live[::order], ()) == (0, "c")
        assert choose_slot(2, live[::order], {"d"}) == (1, "d"), "it waits for that job anyway"
        assert choose_slot(2, live[::order], {"a", "b"}) == (0, "c"), "those are not last"


def test_nothing_joins_slots_beyond_the_limit_or_whose_last_jobs_have_no_known_ids():
    assert choose_slot(2, [in_slot(2, 1.0, "a"), in_slot(1, 2.0, "b"), in_slot(0, 3.0, "c")], {"a"}) == (1, "b")
    live = [in_slot(0, 1.0, "a"), in_slot(0, 2.0, None), in_slot(1, 3.0, "b")]
    assert choose_slot(2, live, {"a"}) == (1, "b")
    assert choose_slot(1, live, {"a"}) is None

"""What a launcher decides, over all that the store and Slurm may say."""

from dataclasses import replace

import pytest
from hfprune_launch.slurm.causes import RETRIES, Cause
from hfprune_launch.slurm.commands import FORGOTTEN, JobInfo
from hfprune_launch.slurm.decide import LAG_S, Do, StageState, about_jobs, job_to_wait_for, to_submit
from hypothesis import given, settings
from hypothesis import strategies as st

HELD = "launch failed requeued held"
REASONS = ["None", "Priority", "Dependency", "DependencyNeverSatisfied", "PartitionDown", "JobHeldUser", HELD]
CLOSES = {Do.CLOSE, Do.SETTLE}
STATES = ["PENDING", "RUNNING", "COMPLETING", "COMPLETED", "FAILED", "CANCELLED", FORGOTTEN]


def job(state, reason="None"):
    return JobInfo("7", state, reason, "", "name")


JOBS = st.none() | st.builds(job, st.sampled_from(STATES), st.sampled_from(REASONS))


def lives(state):
    return state.job is not None and state.job.is_live


@st.composite
def sweeps(draw):
    """The states of stages of which each may need any of those before it."""
    states = {}
    for number in range(draw(st.integers(1, 5))):
        needs = tuple(draw(st.sets(st.sampled_from(sorted(states))))) if states else ()
        is_done, has_attempt = draw(st.booleans()), draw(st.booleans())
        states[str(number)] = StageState(
            str(number),
            needs,
            is_wanted=not is_done and draw(st.booleans()),
            is_done=is_done,
            has_attempt=has_attempt,
            has_id=has_attempt and draw(st.booleans()),
            job=draw(JOBS) if has_attempt else None,
            lasts=draw(st.sampled_from([0.0, 59.0, 61.0, 200.0, 9000.0])),
            ends=tuple(draw(st.lists(st.sampled_from(Cause), max_size=4))),
        )
    return states


@settings(max_examples=60)
@given(sweeps())
def test_no_two_jobs_of_a_stage_and_none_of_a_finished_one(states):
    actions, submitted = about_jobs(states), to_submit(states)
    assert len(set(submitted)) == len(submitted)
    cancelled = {action.stage_id for action in actions if action.do is Do.CANCEL}
    for stage_id in submitted:
        state = states[stage_id]
        assert state.is_wanted and not state.is_done and not state.has_attempt
        assert all(state.ends.count(cause) <= RETRIES.get(cause, 0) for cause in state.ends)
        for need in state.needs:  # which Slurm is told of, as the new job depends on it
            runs = lives(states[need]) and need not in cancelled
            assert states[need].is_done or runs or need in submitted[: submitted.index(stage_id)]
    for action in actions:
        state = states[action.stage_id]
        assert state.has_attempt
        assert not (action.do in CLOSES and lives(state))
        assert action.do is not Do.CANCEL or state.job.is_waiting


STATE = StageState("a", (), is_wanted=True, is_done=False)
DONE = {"is_wanted": False, "is_done": True}


@pytest.mark.parametrize(
    ("seen", "does"),
    [
        ({"job": job("RUNNING", HELD)}, None),
        ({"job": job("COMPLETED")}, None),
        ({"job": job("COMPLETED"), "lasts": LAG_S}, Do.CLOSE),
        ({"job": job("COMPLETED"), **DONE}, Do.CLOSE),
        ({"job": job("FAILED")}, Do.CLOSE),
        ({"job": job(FORGOTTEN)}, Do.SETTLE),
        ({"job": job(FORGOTTEN), **DONE}, Do.CLOSE),
        ({"job": None}, Do.TELL),
        ({"job": None, **DONE}, Do.CLOSE),
        ({"job": None, "has_id": False}, Do.SETTLE),
        ({"job": job("PENDING", "Priority")}, None),
        ({"job": job("PENDING", "Priority"), "lasts": 300.0}, Do.TELL),
        ({"job": job("PENDING", "PartitionDown")}, Do.TELL),
        ({"job": job("PENDING", "Dependency"), "lasts": 1e6}, None),
        ({"job": job("PENDING", HELD)}, Do.CANCEL),
    ],
)
def test_what_is_done_about_a_job(seen, does):
    actions = about_jobs({"a": replace(STATE, has_attempt=True, **{"has_id": True, **seen})})
    assert [action.do for action in actions] == [does] * (does is not None)


@pytest.mark.parametrize(
    ("seen", "is_submitted"),
    [
        ({}, True),
        ({"is_wanted": False}, False),
        ({"ends": (Cause.KILLED,) * 2}, True),
        ({"ends": (Cause.KILLED,) * 3}, False),
        ({"ends": (Cause.BAD_NODE,) * 6}, False),
        ({"ends": (Cause.CANCELLED,)}, False),
        ({"ends": (Cause.INTERRUPTED,) * 50 + (Cause.KILLED,)}, True),
    ],
)
def test_a_stage_is_tried_again_as_often_as_the_causes_of_its_ends_allow(seen, is_submitted):
    assert to_submit({"a": replace(STATE, **seen)}) == ["a"] * is_submitted


@given(st.integers(1, 4), st.lists(st.sampled_from(["submit", "end"]), max_size=40))
def test_no_more_jobs_run_than_are_allowed(limit, events):
    """Each job runs as soon as the one that it waits for is over; the oldest job that runs ends first."""
    waits, live = {}, []
    for number, event in enumerate(events):
        running = [job for job in live if waits[job] not in live]
        assert len(running) == min(limit, len(live)), "no fewer either"
        if event == "submit":
            waits[str(number)] = job_to_wait_for(limit, live)
            live.append(str(number))
        elif running:
            live.remove(running[0])
    assert job_to_wait_for(None, live) is None

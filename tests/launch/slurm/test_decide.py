"""What a launcher decides, over all that the store and Slurm may say."""

from dataclasses import replace

import pytest
from hfprune_launch.slurm.causes import RETRIES
from hfprune_launch.slurm.commands import FORGOTTEN, JobInfo
from hfprune_launch.slurm.decide import LAG_S, Do, StageState, about_job, to_submit
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.store.attempts import Cause

HELD = "launch failed requeued held"
REASONS = ["None", "Priority", "Dependency", "DependencyNeverSatisfied", "PartitionDown", "JobHeldUser", HELD]
CLOSES = {Do.CLOSE, Do.SETTLE}
STATES = ["PENDING", "RUNNING", "COMPLETING", "COMPLETED", "FAILED", "CANCELLED", FORGOTTEN]


def job(state, reason="None"):
    return JobInfo("7", state, reason, "", "name", "name")


JOBS = st.none() | st.builds(job, st.sampled_from(STATES), st.sampled_from(REASONS))


def lives(state):
    return state.job is not None and state.job.is_live


@st.composite
def sweeps(draw):
    """The states of stages of which each may need any of those before it; row "m" stands for a model."""
    states, rows = {}, {}
    for number in range(draw(st.integers(1, 7))):
        stage_id = str(number)
        needs = tuple(draw(st.sets(st.sampled_from(sorted(states)), max_size=2))) if states else ()
        rows[stage_id] = draw(st.sets(st.sampled_from("abm" if not needs else "ab"), max_size=2))
        is_done, has_attempt = draw(st.booleans()), draw(st.booleans())
        states[stage_id] = StageState(
            stage_id,
            needs,
            frozenset(),
            is_wanted=not is_done and draw(st.booleans()),
            is_done=is_done,
            has_attempt=has_attempt,
            has_id=has_attempt and draw(st.booleans()),
            job=draw(JOBS) if has_attempt else None,
            lasts=draw(st.sampled_from([0.0, 59.0, 61.0, 200.0, 9000.0])),
            ends=tuple(draw(st.lists(st.sampled_from(Cause), max_size=4))),
        )
    for stage_id in reversed(states):
        for need in states[stage_id].needs:
            rows[need] |= rows[stage_id] - {"m"}
    return {
        stage_id: replace(state, serves=frozenset("m" if "m" in rows[stage_id] else rows[stage_id] or {stage_id}))
        for stage_id, state in states.items()
    }


@settings(max_examples=150)
@given(sweeps(), st.lists(st.sampled_from(["one node", "two nodes"]), min_size=7, max_size=7))
def test_no_two_jobs_of_a_stage_and_none_of_a_finished_one(states, resources):
    jobs = to_submit(states, lambda stage_id: resources[int(stage_id)])
    submitted = [stage_id for chain in jobs for stage_id in chain]
    assert len(set(submitted)) == len(submitted)
    actions = {stage_id: found[0] for stage_id, state in states.items() if (found := about_job(state))}
    cancelled = {stage_id for stage_id, do in actions.items() if do is Do.CANCEL}
    for chain in jobs:
        assert len({(states[stage_id].serves, resources[int(stage_id)]) for stage_id in chain}) == 1
        for stage_id in chain:
            state = states[stage_id]
            assert state.is_wanted and not state.is_done and not state.has_attempt
            assert all(state.ends.count(cause) <= RETRIES.get(cause, 0) for cause in state.ends)
            for need in state.needs:  # which Slurm is told of, as the new job depends on it
                runs = lives(states[need]) and need not in cancelled
                assert states[need].is_done or runs or need in submitted[: submitted.index(stage_id)]
                for other in jobs:
                    if other is not chain and need in other[:-1]:  # nobody waits for more than that, except for a pass
                        assert not states[other[other.index(need) + 1]].needs
    for stage_id, do in actions.items():
        state = states[stage_id]
        assert state.has_attempt
        assert not (do in CLOSES and lives(state)) or (do is Do.CLOSE and state.is_done)
        assert do is not Do.CANCEL or state.job.is_waiting


def test_a_job_runs_what_a_row_wants_with_the_same_resources():
    """Two rows of a model, the first with an efficiency that wants other resources than the rest."""
    needs = {"importance": "", "reference": "", "prune 1": "importance", "recover 1": "prune 1"}
    needs |= {"evaluate 1": "recover 1,reference", "efficiency 1": "prune 1", "prune 2": "importance"}
    needs |= {"recover 2": "prune 2", "evaluate 2": "recover 2,reference", "efficiency 2": "prune 2"}
    states = {
        name: StageState(name, tuple(filter(None, of.split(","))), frozenset(name[-1]), is_wanted=True, is_done=False)
        for name, of in needs.items()
    }
    rows = [["prune 2", "recover 2", "evaluate 2", "efficiency 2"], ["efficiency 1"]]
    jobs = to_submit(states, lambda name: name == "efficiency 1")
    assert jobs == [["importance", "reference"], ["prune 1"], rows[0], ["recover 1", "evaluate 1"], rows[1]]
    for name in ("prune 2", "recover 2"):
        states[name] = replace(states[name], is_wanted=False, is_done=True)
    first = ["prune 1", "recover 1", "evaluate 1", "efficiency 1"]
    assert to_submit(states, lambda _: None) == [["importance", "reference"], first, ["evaluate 2", "efficiency 2"]]


STATE = StageState("a", (), frozenset("a"), is_wanted=True, is_done=False)
DONE = {"is_wanted": False, "is_done": True}


@pytest.mark.parametrize(
    ("seen", "does"),
    [
        ({"job": job("RUNNING", HELD)}, None),
        ({"job": job("COMPLETED")}, None),
        ({"job": job("COMPLETED"), "lasts": LAG_S}, Do.CLOSE),
        ({"job": job(FORGOTTEN)}, Do.SETTLE),
        ({"job": job(FORGOTTEN), **DONE}, Do.CLOSE),
        ({"job": None}, Do.TELL),
        ({"job": None, **DONE}, Do.CLOSE),
        ({"job": None, "has_id": False}, Do.SETTLE),
        ({"job": job("PENDING", "Priority")}, None),
        ({"job": job("PENDING", "PartitionDown")}, Do.TELL),
        ({"job": job("RUNNING"), **DONE}, Do.CLOSE),
        ({"job": job("PENDING"), **DONE}, None),
        ({"job": job("PENDING", HELD)}, Do.CANCEL),
    ],
)
def test_what_is_done_about_a_job(seen, does):
    found = about_job(replace(STATE, has_attempt=True, **{"has_id": True, **seen}))
    assert (found and found[0]) == does


def test_a_stage_is_tried_again_as_often_as_the_causes_of_its_ends_allow():
    for number in range(5):
        ends = (Cause.INTERRUPTED,) * 50 + (Cause.KILLED,) * number
        assert to_submit({"a": replace(STATE, ends=ends)}, len) == [["a"]] * (number <= 3)

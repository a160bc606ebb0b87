import os
import shutil
import sys
from functools import partial

import pytest
from hfprune_launch.slurm import job
from hfprune_launch.slurm.job import NodeError, Start, meet, rank_environment
from made_stages import begun, stage_of, taken_over
from ranks import SoloWorld

from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.store.attempts import Ledger, Run
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

TASK = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}


def test_ranks_meet_at_an_address_not_a_name():
    assert rank_environment(TASK) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    assert rank_environment({**TASK, "GLOO_SOCKET_IFNAME": "ib0"})["GLOO_SOCKET_IFNAME"] == "ib0"


def test_ranks_meet_at_a_port_of_their_own_whatever_else_runs_on_the_node(tmp_path):
    """Also with those of a job whose id differs by any multiple of anything."""
    ports, living = [], []
    for job_id in ("12345", "24345"):
        ranks = [{"SLURM_JOB_ID": job_id, "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for rank in "01"]
        living += [meet(tmp_path, rank) for rank in ranks]
        assert ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
        ports.append(ranks[0]["MASTER_PORT"])
    assert len({*ports}) == 2 and living[0] is not None


def test_a_node_without_a_route_to_the_first_rank_is_named():
    with pytest.raises(NodeError, match="has no route to the first rank"):
        rank_environment({**TASK, "SLURM_LAUNCH_NODE_IPADDR": "no.such.host.invalid"})
    with pytest.raises(NodeError, match="SLURM_LAUNCH_NODE_IPADDR is not set"):
        rank_environment({**TASK, "SLURM_LAUNCH_NODE_IPADDR": ""})


STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


@pytest.fixture
def attempt(store):
    return begun(store, STAGE, time_minutes=60)


@pytest.fixture
def rank(store, attempt, monkeypatch):
    """Rank 0 of a job."""
    for key, value in {**TASK, "SLURM_PROCID": "0", "SLURMD_NODENAME": "n7"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(job, "prepare_environment", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return partial(job.run_rank, attempt.folder, Interruption())


def end_of(rank, monkeypatch, stage):
    """Return the exit code of a rank whose stage is ``stage``."""

    def run_stage(handle, interruption, should_run):
        is_wanted, claim = should_run(SoloWorld())
        assert is_wanted and claim.is_held()
        stage(claim)

    monkeypatch.setattr(job, "run_stage", run_stage)
    return rank()


def test_rank_0_says_what_its_node_lacks_where_it_can_record_nothing(rank, store, monkeypatch, capfd):
    shutil.rmtree(store.root)
    assert end_of(rank, monkeypatch, lambda claim: None) == 2
    said = capfd.readouterr().err
    assert "error: node n7 does not see" in said and "that all nodes share" in said and "Traceback" not in said
    assert not store.root.exists()


@pytest.mark.parametrize("error", [None, FileNotFoundError("partial.safetensors")])
def test_a_job_that_was_taken_for_dead_leaves_the_stage_to_its_successor(rank, store, attempt, monkeypatch, error):
    successors = []

    def suspended(claim):
        successors.append(taken_over(store, STAGE))
        successors.append(store.handle(STAGE.id).open_draft(successors[0]))
        if error is None:
            claim.require_held()
        raise error

    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    assert end_of(rank, monkeypatch, suspended) == (75 if error is None else 1)
    assert attempt.runs()[-1].how == "duplicate"
    assert successors[0].is_held() and successors[1].is_dir()


def test_a_job_leaves_its_nodes_where_another_process_has_the_stage(rank, store, attempt, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(job.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(job, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    start, claim = Start(store.handle(STAGE.id), attempt.intent.number), store.handle(STAGE.id).claim()
    assert start.ask() == "held" and 20 < clock[0] <= 40
    claim.release()
    assert start.ask() == "run"
    with pytest.raises(UserError, match="no record of attempt 9"):
        Start(store.handle(STAGE.id), 9)


def test_starts_that_were_killed_say_nothing_of_how_far_a_job_gets(rank, store, attempt):
    store.handle(STAGE.id).work.mkdir(parents=True, exist_ok=True)
    Progress(store.handle(STAGE.id).work).update("layers", 3, 9)
    start = Start(store.handle(STAGE.id), attempt.intent.number)
    assert attempt.runs()[0].progress == {"phase": "layers", "done": 3}, "from where a start goes on"
    start.end("interrupted")
    for number in (1, 2, 3):
        attempt.record_run(Run("12345", number, "n1", 1.0))
    assert not start.gets_no_further()


RUNNING = "JobState=RUNNING PreemptTime=None"


@pytest.mark.parametrize(
    ("done", "says", "queued", "how", "failure"),
    [
        (4, RUNNING, True, "interrupted", None),
        (None, RUNNING, False, "interrupted", "input"),
        (3, RUNNING, False, "interrupted", "input"),  # by its time limit, for the third time without getting further
        (2, RUNNING, False, "interrupted", "input"),
        (3, "JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True, "interrupted", None),  # not the job's fault
        (4, "JobState=COMPLETING", True, "interrupted", None),  # Slurm itself puts it back
        (4, "JobState=CANCELLED", False, "cancelled", None),
    ],
)
def test_an_interrupted_job_puts_itself_back_into_the_queue_where_that_helps(
    rank, store, attempt, fake, monkeypatch, done, says, queued, how, failure
):
    fake.shown = f"JobId=12345 JobName=x {says} Reason=None\n"
    for number in range(3):
        ended = 2.0 + number
        attempt.record_run(Run("12345", number, "n1", 1.0, ended, "interrupted", {"phase": "layers", "done": 3}))
    monkeypatch.setitem(os.environ, "SLURM_RESTART_COUNT", "3")

    def interrupted(claim):
        if done is not None:
            Progress(store.handle(STAGE.id).work).update("layers", done, 9)
        raise Interrupted

    assert end_of(rank, monkeypatch, interrupted) == 1, "or its script would go on with the next stage"
    assert fake.calls("scontrol requeue") == ["scontrol requeue 12345"] * (queued and "RUNNING" in says)
    assert attempt.runs()[-1].how == how
    found = Ledger(store).failure(STAGE.id)
    assert (found and found.cause) == failure

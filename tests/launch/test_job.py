import pytest
from fake_slurm import FakeSlurm

from hfprune_dist.artifacts import Store
from hfprune_dist.parallel.interruption import Interruption
from hfprune_dist.plan import Input, Stage
from hfprune_dist.progress import Progress, read_failure
from launch.job import NodeError, _Rank, array_job_id, preflight, rank_environment
from launch.ledger import Ledger, Run

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
        "MASTER_PORT": "20345",
    }


def test_a_rank_that_sees_its_own_gpu_only():
    assert rank_environment({**TASK, "CUDA_VISIBLE_DEVICES": "1"})["LOCAL_RANK"] == "0"
    assert rank_environment({**TASK, "CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set"),
        ({"SLURM_LAUNCH_NODE_IPADDR": None}, "the ranks can't find each other"),
        ({"SLURM_LAUNCH_NODE_IPADDR": "no.such.host.invalid"}, "does not resolve"),
    ],
)
def test_what_is_missing_is_named(change, message):
    environment = {key: value for key, value in {**TASK, **change}.items() if value is not None}
    with pytest.raises(NodeError, match=message):
        rank_environment(environment)


def test_an_array_element_is_not_its_whole_array():
    assert array_job_id({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "4"}) == "9_4"
    assert array_job_id({"SLURM_JOB_ID": "9"}) == "9"


def test_preflight_names_node_and_lack(tmp_path):
    with pytest.raises(NodeError, match=r"node n7 does not see .*file system that all nodes share"):
        preflight(Store(tmp_path / "elsewhere"), {"SLURMD_NODENAME": "n7", "HFPRUNE_CODE": str(tmp_path)})
    with pytest.raises(NodeError, match="not the sweep's snapshot"):
        preflight(Store(tmp_path), {"SLURMD_NODENAME": "n7", "HFPRUNE_CODE": str(tmp_path)})


@pytest.mark.parametrize(
    ("done", "says", "requeued"),
    [
        (4, "JobState=RUNNING PreemptTime=None", True),
        (3, "JobState=RUNNING PreemptTime=None", False),
        (3, "JobState=RUNNING PreemptTime=2026-01-01T00:00:00", True),  # preemption is not the job's fault
    ],
)
def test_a_job_that_its_time_limit_ends_before_it_gets_further_is_not_requeued(
    tmp_path, monkeypatch, capfd, done, says, requeued
):
    stage = Stage("importance", "a", {}, {"model": Input("digest", "/model")})
    store, fake = Store(tmp_path / "store"), FakeSlurm(tmp_path / "slurm").on_path(monkeypatch)
    (fake.folder / "job").write_text(f"JobId=7 JobName=x {says} Reason=None\n")
    attempt = Ledger(store.root).open_attempt(stage, 0, 1, 60, None)
    earlier = {"phase": "calibration", "done": 3, "total": 9, "updated": 0.0}
    for number in range(3):
        attempt.record_run(Run("7", number, "n1", 1.0 + number, 2.0 + number, "interrupted", earlier))
    environment = {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3"}
    for name, value in {**environment, "SUBMITIT_FOLDER": str(attempt.folder)}.items():
        monkeypatch.setenv(name, value)
    rank = _Rank(store, stage.id, Interruption())
    store.work(stage.id).mkdir(parents=True)
    Progress(store.work(stage.id)).update("calibration", done, 9)
    assert rank._requeue() is requeued
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7"] * requeued
    failure = read_failure(store.work(stage.id))
    if requeued:
        assert failure is None
    else:
        assert failure.cause == "time limit without progress" and "raise time_minutes" in capfd.readouterr().out

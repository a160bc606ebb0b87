import pytest

from launch.job import NodeError, array_job_id, preflight, rank_environment

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
    from hfprune_dist.artifacts import Store

    with pytest.raises(NodeError, match=r"node n7 does not see .*file system that all nodes share"):
        preflight(Store(tmp_path / "elsewhere"), {"SLURMD_NODENAME": "n7", "HFPRUNE_CODE": str(tmp_path)})
    with pytest.raises(NodeError, match="not the sweep's snapshot"):
        preflight(Store(tmp_path), {"SLURMD_NODENAME": "n7", "HFPRUNE_CODE": str(tmp_path)})

"""Surroundings of a launcher and its jobs: another job's environment, odd paths, a profile's setup, rank crashes."""

import pytest
from clusters import CONTROL, attempt_folders, causes, read

pytestmark = [pytest.mark.slurm, pytest.mark.beside, pytest.mark.thorough]

# As in a shell inside an interactive job on a GPU node, and as people set them for jobs of another kind.
SURROUNDINGS = {
    **dict.fromkeys(["SLURM_JOB_ID", "SLURM_JOBID", "SLURM_ARRAY_JOB_ID"], "999"),
    **dict.fromkeys(["SLURM_NTASKS", "SLURM_NNODES", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"], "7"),
    **dict.fromkeys(["SLURM_PROCID", "SLURM_LOCALID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID"], "3"),
    **dict.fromkeys(["SLURM_MEM_PER_CPU", "SBATCH_MEM_PER_CPU", "SLURM_GPUS_ON_NODE", "SLURM_RESTART_COUNT"], "10"),
    **dict.fromkeys(["SLURM_EXPORT_ENV", "SBATCH_EXPORT", "SRUN_EXPORT_ENV"], "NONE"),
    **dict.fromkeys(["SLURM_PARTITION", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SLURM_NODELIST"], "nowhere"),
    **dict.fromkeys(["SLURM_WORKING_DIR", "SBATCH_OUTPUT"], "/nowhere"),
    **dict.fromkeys(["SLURM_TIMELIMIT", "SBATCH_NO_REQUEUE"], "1"),
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x10",
}


def test_a_launcher_inside_another_job(cluster, config, without):
    out, profile = without(CONTROL), cluster.profile("inside", memory="1G")
    code, output = cluster.submit(config, out, profile=profile, real=True, **SURROUNDINGS).end()
    assert code == 0, output
    assert causes(out) == ["done"]
    (run,) = [read(file) for file in attempt_folders(out)[0].glob("run.*.json")]
    assert "_" not in run["job_id"] and run["restart"] == 0

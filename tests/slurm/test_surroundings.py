"""Surroundings of a launcher and its jobs: another job's environment, odd paths, a profile's setup, rank crashes."""

import shutil

import pytest
from clusters import CONTROL, DENSE, FORKED_RANKS, attempt_folders, causes, read
from sweeps import results

pytestmark = [pytest.mark.slurm, pytest.mark.beside]

# As in a shell inside an interactive job on a GPU node, and as people set them for jobs of another kind.
SURROUNDINGS = {
    "SLURM_JOB_ID": "999",
    "SLURM_JOBID": "999",
    "SLURM_JOB_NODELIST": "gpu7",
    "SLURM_NODELIST": "gpu7",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_NNODES": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_CPUS_PER_TASK": "7",
    "SLURM_TASKS_PER_NODE": "2(x4)",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_MEM_PER_CPU": "10",
    "SLURM_MEM_PER_GPU": "10",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x10",
    "SLURM_GPUS": "4",
    "SLURM_GPUS_PER_NODE": "4",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_JOB_GPUS": "0,1,2,3",
    "SLURM_ARRAY_JOB_ID": "999",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_HET_SIZE": "2",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_TIMELIMIT": "1",
    "SLURM_PARTITION": "nowhere",
    "SLURM_STEP_ID": "0",
    "SLURM_WORKING_DIR": "/nowhere",
    "SBATCH_PARTITION": "nowhere",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_ACCOUNT": "nobody",
    "SBATCH_QOS": "none",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_MEM_PER_CPU": "10",
    "SBATCH_ARRAY_INX": "0-1",
    "SBATCH_OUTPUT": "/nowhere",
    "SBATCH_RESERVATION": "none",
    "SLURM_RESTART_COUNT": "5",
}


def test_a_launcher_inside_another_job(cluster, config, without):
    out, profile = without(CONTROL), cluster.profile("inside", memory="1G")
    code, output = cluster.submit(config, out, profile=profile, real=True, **SURROUNDINGS).end()
    assert code == 0, output
    assert causes(out) == ["done"]
    (run,) = [read(file) for file in attempt_folders(out)[0].glob("run.*.json")]
    assert "_" not in run["job_id"] and run["restart"] == 0


def test_odd_characters_in_the_path(cluster, config, without, tmp_path_factory):
    out = tmp_path_factory.mktemp("odd") / 'it\'s a "test" $HOME `id` #1 ~ & ; * [x] Größe 模型' / "out"
    shutil.copytree(without(DENSE), out, ignore=shutil.ignore_patterns("code"))  # so that it is copied there, too
    code, output = cluster.submit(config, out).end()
    assert code == 0, output
    assert causes(out) == ["done"]
    (folder,) = attempt_folders(out)
    assert {file.name for file in folder.glob("*_log.*")} >= {f"{read(folder / 'job.json')['job_id']}_0_log.err"}


def test_a_setup_line_that_fails(cluster, config, without):
    out = without(CONTROL)
    wrong = cluster.profile("setup", setup=["true", "module load no/such", "echo never"])
    code, output = cluster.submit(config, out, profile=wrong).end()
    assert (
        code == 2
        and "setup in the profile failed in its line 2" in output
        and "module: command not found" in output
        and "Traceback" not in output
    ), output
    assert causes(out) == ["input"], "not tried again"
    assert not list(attempt_folders(out)[0].glob("run.*.json")), "no rank was started"


def test_a_rank_that_crashes(cluster, config, without, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crash")
    (folder / "sitecustomize.py").write_text(
        "import ctypes, os, pathlib\n"
        f"once = pathlib.Path({str(folder)!r}) / 'crashed'\n"
        "if os.environ.get('SLURM_PROCID') == '0' and not once.exists():\n"
        "    once.touch()\n"
        "    ctypes.string_at(0)\n"
    )
    out = without(CONTROL)
    code, output = cluster.submit(config, out, PYTHONPATH=str(folder), **FORKED_RANKS).end()
    assert code == 0, output
    assert causes(out) == ["killed", "done"]
    end = read(attempt_folders(out)[0] / "end.json")
    assert "rank 0 on n1 was ended by SIGSEGV" in end["message"].splitlines()[0]
    assert {row["status"] for row in results(out)} == {"done"}

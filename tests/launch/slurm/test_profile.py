from pathlib import Path

import pytest
from hfprune_launch.slurm.profile import Resources, load_profile

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.errors import UserError

SHIPPED = Path(__file__).resolve().parents[3] / "slurm" / "profiles"


def write(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED.glob("*.yaml")))
def test_shipped_profiles_are_valid(name):
    profile = load_profile(name, SHIPPED)
    assert set(profile.resources) == set(KINDS)


def test_an_unknown_profile():
    with pytest.raises(UserError, match=r"no profile 'local-clutser'; did you mean 'local-cluster'"):
        load_profile("local-clutser", SHIPPED)


def test_a_kind_of_stage_overrides_single_settings(tmp_path):
    common = "partition: gpu\ntasks_per_node: 8\ngpus_per_node: 8\nmax_running: 3\n"
    profile = load_profile(write(tmp_path, common + "stages: {importance: {nodes: 4}}\n"), SHIPPED)
    importance, evaluate = profile.resources["importance"], profile.resources["evaluate"]
    assert (importance.ranks, importance.gpus, importance.partition) == (32, 32, "gpu")
    assert evaluate.ranks == 8 and profile.max_running == 3
    assert [Resources(memory=memory).memory_bytes for memory in ("3tb", "512", "0")] == [3 * 2**40, 512 * 2**20, None]


def test_environment_and_sbatch_are_merged_key_by_key_and_lists_replaced(tmp_path):
    common = (
        "environment: {NCCL_DEBUG: WARN, A: '1'}\nsbatch: {reservation: week4, mail-user: me}\n"
        "setup: [module load cuda]\nsrun_args: [--cpu-bind=none]\n"
    )
    own = "stages: {recover: {environment: {A: '2', B: '3'}, sbatch: {reservation: null, nice: 5}, setup: [true]}}\n"
    profile = load_profile(write(tmp_path, common + own.replace("[true]", "['echo b']")), SHIPPED)
    recover, prune = profile.resources["recover"], profile.resources["prune"]
    assert recover.environment == {"NCCL_DEBUG": "WARN", "A": "2", "B": "3"}
    assert recover.sbatch == {"mail-user": "me", "nice": 5}
    assert recover.setup == ["echo b"] and recover.srun_args == prune.srun_args == ["--cpu-bind=none"]
    assert prune.environment == {"NCCL_DEBUG": "WARN", "A": "1"} and prune.setup == ["module load cuda"]
    assert profile.resources["loraprune"] == recover, "which it is, where nothing is said of it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partitoin: gpu", ["unknown key 'partitoin'", "did you mean 'partition'", "time_minutes"]),
        ("memory: 200B", ["memory", "pattern"]),  # nor would sbatch take it
        ("time_minutes: 5\nsignal_seconds: 6000", ["signal_seconds 6000 is more than time_minutes 5"]),
        ("gpus_per_node: 8\ntasks_per_node: 16", ["tasks_per_node 16 is more than gpus_per_node 8"]),
        ('account: "x\\nrm -rf ~"', ["account: 'x\\nrm -rf ~' has a character that a line"]),
        ("stages: {prune: {sbatch: {comment: 'a\\'}}}", ["stages.prune", "sbatch: 'a\\\\' has a character"]),
        ("sbatch: {mem_per_cpu: 3}", ["'mem_per_cpu': give an option's long name", "only between words: mem-per-cpu"]),
        ("stages: {recover: {sbatch: {mem: 3}}}", ["stages.recover", "mem is not to be given there; a key"]),
    ],
)
def test_mistakes_are_explained(tmp_path, text, expected):
    with pytest.raises(UserError) as caught:
        load_profile(write(tmp_path, text), SHIPPED)
    for part in expected:
        assert part in f"{caught.value}\n"


def test_any_language_is_taken(tmp_path):
    """With what some scripts have between words and letters; a separator of lines isn't among it."""
    comment = "\N{NO-BREAK SPACE}\N{IDEOGRAPHIC SPACE}\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH SPACE}"
    assert (
        load_profile(write(tmp_path, f"account: 'a{comment}b'"), SHIPPED).resources["prune"].account == f"a{comment}b"
    )
    for separator in ("\\L", "\\P", "\\N", "\\x7f"):
        with pytest.raises(UserError, match="has a character that a line"):
            load_profile(write(tmp_path, f'account: "a{separator}b"'), SHIPPED)


def test_efficiency_is_measured_on_what_is_asked_for(tmp_path):
    common = "partition: gpu\nnodes: 2\ntasks_per_node: 8\ngpus_per_node: 8\nconstraint: a100\ngpu_type: a100\n"
    efficiency = load_profile(write(tmp_path, common), SHIPPED).resources["efficiency"]
    own = load_profile(write(tmp_path, f"{common}stages: {{efficiency: {{qos: low}}}}\n"), SHIPPED)
    assert (efficiency.ranks, own.resources["efficiency"].ranks, own.resources["efficiency"].gpus) == (16, 1, 1)
    assert efficiency.device(3) == "partition gpu, constraint a100, gpu_type a100, a GPU"
    without = load_profile(write(tmp_path, "cpus_per_task: 4\n"), SHIPPED).resources["efficiency"]
    assert without.gpus == 0 and without.device(3) == "threads: 3"
    with pytest.raises(UserError, match="gpu_type tells of GPUs, but no kind of stage asks for any; set gpus_per_node"):
        load_profile(write(tmp_path, "gpu_type: a100\ngpu_memory_gib: 80\n"), SHIPPED)


def test_stages_of_a_job_differ_in_their_time_limits_alone(tmp_path):
    text = "time_minutes: 5\nstages: {recover: {time_minutes: 9, signal_seconds: 60}, evaluate: {nodes: 2}}\n"
    profile = load_profile(write(tmp_path, text), SHIPPED)
    assert profile.allocation("prune/1") == profile.allocation("recover/2") != profile.allocation("evaluate/3")
    job = profile.of_job(["prune", "recover"])
    assert (job.time_minutes, job.signal_seconds) == (9, 120)

"""This machine's device, and the note on stages whose dtype its CPU computes slowly."""

import pytest
from hfprune_launch.local import hardware
from hfprune_launch.local.hardware import device_here, note_on_bfloat16
from made_stages import stage_of

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.config.texts import CalibrationConfig
from hfprune_dist.kinds.importance import ImportanceParameters
from hfprune_dist.store import machine as machine_module
from hfprune_dist.store.machine import threads_allowed

BEFORE_AVX512, AVX512 = "flags\t\t: fpu sse2 avx avx2 fma", "flags\t\t: fpu sse2 avx avx2 fma avx512f avx512bw"
ARM = "Features\t: fp asimd bf16"
PASS = ImportanceParameters(calibration=CalibrationConfig(), criteria=[], dtype="bfloat16", add_bos_token=True, seed=0)
CUT = stage_of("prune", "alpha 0.2", {"ratio": 0.2, "criterion": "entropy", "refit": "none"}, {})


@pytest.fixture
def machine(tmp_path, monkeypatch):
    def build(line, gpus=""):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n\nprocessor\t: 1\n{line}\n")
        monkeypatch.setattr(machine_module, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)

    return build


def test_bfloat16_is_warned_of_where_a_stage_would_use_it_and_the_cpu_is_slow_at_it(machine):
    stages = [CUT, stage_of("importance", "alpha", PASS, {})]
    machine(BEFORE_AVX512)
    assert "--set importance.dtype=float32 --set" in note_on_bfloat16(stages) and not note_on_bfloat16([CUT])
    for line, gpus in ((AVX512, ""), (BEFORE_AVX512, "0,1"), (ARM, "")):
        machine(line, gpus)
        assert not note_on_bfloat16(stages)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("", 0), ("0, 2", 2), ("1,-1,0", 1), ("GPU-1f,MIG-2", 2), ("NoDevFiles", 0)],
)
def test_gpus_are_counted_as_cuda_does(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.count_gpus() == gpus


@pytest.mark.parametrize(("visible", "asked", "ranks"), [("0", 3, 1), ("0,1", None, 2), ("", 3, 3), ("", None, 1)])
def test_each_rank_has_a_gpu_where_there_are_any(monkeypatch, visible, asked, ranks):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.ranks_here(RuntimeConfig(ranks=asked)) == ranks


def test_threads_are_those_of_the_outermost_level():
    for value, threads in (("", None), ("0", None), ("3", 3), ("4,2", 4), ("x", None)):
        assert threads_allowed({"OMP_NUM_THREADS": value}) == threads


def test_the_device_of_one_rank_is_told_without_torch(machine, tmp_path, monkeypatch):
    machine("model name\t: A processor @ 2 GHz")
    assert device_here(RuntimeConfig(threads_per_rank=3, ranks=2)) == "A processor @ 2 GHz, threads: 3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert device_here(RuntimeConfig()) == "A processor @ 2 GHz, threads: 5"
    machine(AVX512, gpus="0,1")
    monkeypatch.setattr(hardware, "NVIDIA", tmp_path)
    assert device_here(RuntimeConfig()) == "a GPU", "whose driver tells nothing"
    for number in range(2):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_text("Model: \t\t NVIDIA A100\nIRQ: 7\n")
    assert device_here(RuntimeConfig()) == "NVIDIA A100"

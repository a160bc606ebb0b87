"""Whether ranks would compute in a dtype that this CPU is slow with."""

import pytest

from hfprune_dist.plan import Stage
from launch import hardware
from launch.hardware import note_on_bfloat16

BEFORE_AVX512, AVX512 = "fpu sse2 avx avx2 fma", "fpu sse2 avx avx2 fma avx512f avx512bw avx512vl"
STAGES = [
    Stage("importance", "alpha", {"dtype": "bfloat16"}, {}),
    Stage("prune", "alpha 0.2", {"ratio": 0.2}, {}),
    Stage("recover", "alpha 0.2 + lora", {"recovery": {"dtype": "bfloat16"}}, {}),
    Stage("evaluate", "alpha", {"dtype": "float32"}, {}),
]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    def build(flags, gpus=""):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
        monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)

    return build


def test_the_note_names_the_settings_of_the_stages_to_run(machine):
    machine(BEFORE_AVX512)
    assert note_on_bfloat16(STAGES).endswith(": --set importance.dtype=float32 --set recovery.dtype=float32")
    assert note_on_bfloat16(STAGES[:1]).endswith(": --set importance.dtype=float32")


@pytest.mark.parametrize(("flags", "gpus"), [(AVX512, ""), (BEFORE_AVX512, "0,1"), ("Features: asimd", "")])
def test_no_note_where_bfloat16_is_no_slower(machine, flags, gpus):
    machine(flags, gpus)
    assert not note_on_bfloat16(STAGES)


def test_no_note_where_all_that_is_left_computes_in_float32(machine, tmp_path, monkeypatch):
    machine(BEFORE_AVX512)
    assert not note_on_bfloat16([STAGES[1], STAGES[3]])
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "none")
    assert not note_on_bfloat16(STAGES)

"""Micro-batches that planning chooses: for the available GPUs, once per folder."""

import os

import pytest
import yaml
from hfprune_launch.modes.sweep_arguments import Command
from hfprune_launch.modes.sweep_plan import prepare
from hfprune_launch.screen import make_console
from hfprune_launch.sweep import sweep_parser
from hfprune_launch.sweep_folder import write_config

# So little that a tiny model's activations matter.
SMALL, LARGE = 1, 80 * 1024


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that gives this machine two GPUs of so many MiB each, as nvidia-smi reports them."""

    def build(mebibytes):
        (tmp_path / "bin").mkdir(exist_ok=True)
        script = tmp_path / "bin" / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho {mebibytes}\necho {mebibytes}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    return build


def command(config, out, *arguments):
    automatic = ["--set", "recovery.micro_batch_size=auto", "--set", "recovery.batch_size=16"]
    given = [*([] if config is None else ["--config", str(config)]), *arguments]
    return Command(sweep_parser().parse_args([*automatic, *given]), out, make_console())


def begin(config, out):
    """Do what a sweep does before its first stage; return recovery's rows at a time and the ids of the stages."""
    prepared = prepare(command(config, out), download=False)
    out.mkdir(exist_ok=True)
    write_config(out, prepared.config, prepared.models)
    return prepared.config.recovery.micro_batch_size, set(prepared.sweep.plan.stages)


def test_the_first_run_in_a_folder_chooses_for_all_that_follow(machine, config, tmp_path):
    machine(LARGE)
    rows, stages = begin(config, tmp_path / "one")
    assert rows == 8, "with two ranks, a whole step of 16"
    assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["recovery"]["micro_batch_size"] == 8
    machine(SMALL)
    assert begin(config, tmp_path / "two")[0] == 1
    for again in (config, None):
        assert begin(again, tmp_path / "one") == (rows, stages)


def test_the_profile_of_a_cluster_decides(machine, config, tmp_path):
    machine(SMALL)
    profile = tmp_path / "mine.yaml"
    profile.write_text("tasks_per_node: 4\ngpus_per_node: 4\ngpu_memory_gib: 80\n")
    chosen = prepare(command(config, tmp_path / "out", "--profile", str(profile)), download=False)
    assert chosen.config.recovery.micro_batch_size == 4
    profile.write_text("tasks_per_node: 4\ngpus_per_node: 4\n")
    other = command(config, tmp_path / "other", "--profile", str(profile))
    assert prepare(other, download=False).config.recovery.micro_batch_size == 1


def test_where_the_memory_of_gpus_is_not_told_it_is_one(machine, config, tmp_path):
    machine("unknown")
    assert begin(config, tmp_path / "out")[0] == 1

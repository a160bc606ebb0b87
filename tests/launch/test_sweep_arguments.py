"""What the flags of a command line come to as settings."""

import pytest
from hfprune_launch import prepare, sweep
from hfprune_launch.sweep import _parse, overrides_of
from sweeps import in_process
from tiny import save_tiny

from hfprune_dist.config.load import load_config
from hfprune_dist.store.machine import count_gpus


def configured(*arguments):
    return load_config([], overrides_of(_parse(arguments)))


KEY, SECTION = "runtime.ranks=2", "runtime={ranks: 3}"


@pytest.mark.parametrize("written", [[KEY], [SECTION], [KEY, SECTION], [SECTION, KEY]])
def test_a_flag_of_its_own_wins_over_assignments_in_whichever_way_they_are_written(written):
    given = [word for assignment in written for word in ("--set", assignment)]
    assert configured(*given, "--ranks", "5").runtime.ranks == 5


def test_more_ranks_than_cores_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "usable_cores", lambda: 2)
    save_tiny(tmp_path / "alpha")
    arguments = ["--models", tmp_path / "alpha", "--out", tmp_path / "out", "--ranks", "64", "--dry-run"]
    _, shown, _ = in_process(sweep.main, *arguments, "--set", "recovery.method=none")
    assert ("note: 64 ranks share 2 cores" in shown) == (count_gpus() == 0)


def test_lists_that_are_given_in_parts_add_up():
    config = configured("--ratios", "0.1", "--ratios", "0.2,0.3", "--models", "a/b", "--models", "c/d")
    assert (config.ratios, config.models) == ([0.1, 0.2, 0.3], ["a/b", "c/d"])

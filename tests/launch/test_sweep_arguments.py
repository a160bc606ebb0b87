"""What the flags of a command line come to as settings."""

import pytest
from hfprune_launch.sweep import _parse, overrides_of

from hfprune_dist.config.load import load_config


def configured(*arguments):
    return load_config([], overrides_of(_parse(arguments)))


KEY, SECTION = "runtime.ranks=2", "runtime={ranks: 3}"


@pytest.mark.parametrize("written", [[KEY], [SECTION], [KEY, SECTION], [SECTION, KEY]])
def test_a_flag_of_its_own_wins_over_assignments_in_whichever_way_they_are_written(written):
    given = [word for assignment in written for word in ("--set", assignment)]
    assert configured(*given, "--ranks", "5").runtime.ranks == 5


def test_lists_that_are_given_in_parts_add_up():
    engines = ["--for", "vllm,llama.cpp", "--for", "mlx"]
    config = configured("--ratios", "0.1", "--ratios", "0.2,0.3", "--models", "a/b", "--models", "c/d", *engines)
    assert (config.ratios, config.models) == ([0.1, 0.2, 0.3], ["a/b", "c/d"])
    assert config.prune.for_engines == ["vllm", "llama.cpp", "mlx"]

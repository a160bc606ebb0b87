import platform

from hfprune_launch.benchmark.isolated import call


def test_a_single_process_answers_whatever_rank_is_inherited(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call("platform:python_version", {}, {}) == platform.python_version()

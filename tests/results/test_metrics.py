"""Headlines of tasks, and their average."""

import pytest

from hfprune_dist.results.metrics import average, headline


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"acc": 0.4, "acc_stderr": 0.2, "acc_norm": 0.5, "acc_norm_stderr": 0.1}, (0.5, 0.1)),
        ({"likelihood_diff": 3.0, "pct_stereotype": 0.6}, (0.6, None)),
        ({"exact_match[flexible-extract]": 0.3, "exact_match[strict-match]": 0.2}, (0.2, None)),
        ({"exact_match[get-answer]": 0.7, "exact_match[get-answer]_stderr": 0.1}, (0.7, 0.1)),
        ({"exact": 61.2, "f1": 75.0, "f1_stderr": 1.5, "HasAns_f1": 74.9}, (0.75, 0.015)),  # squadv2, in percent
        ({"inst_level_loose_acc": 0.5, "prompt_level_strict_acc": 0.4}, (0.4, None)),  # ifeval
        ({"word_perplexity": 12.0, "byte_perplexity": 2.0}, (None, None)),
        ({"acc_norm": None, "acc": 0.4}, (None, None)),  # a missing score stays missing
        ({}, (None, None)),
    ],
)
def test_headline(metrics, expected):
    assert headline(metrics) == expected


def test_an_average_and_its_error_are_those_of_independent_tasks():
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.03}, "b": {"acc_norm": 0.7, "acc_norm_stderr": 0.04}}
    assert average(tasks) == (pytest.approx(0.6), pytest.approx(0.025))
    assert average(tasks | {"wikitext": {"word_perplexity": 20.0}}) == average(tasks), "which are not averaged"
    assert average(tasks | {"c": {"acc": 0.6, "acc_stderr": None}}) == (pytest.approx(0.6), None)


@pytest.mark.parametrize("missing", [{}, {"acc": None}])
def test_an_average_of_an_incomplete_row_is_missing(missing):
    assert average({"a": {"acc": 0.5}, "b": missing}) == average({}) == (None, None)

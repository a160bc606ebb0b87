import pytest

from hfprune_dist.results.headline import average_errors, averages, headline, headline_error


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"acc": 0.4, "acc_norm": 0.5, "acc_norm_stderr": 0.1}, 0.5),
        ({"acc": 0.4, "acc_stderr": 0.1}, 0.4),
        ({"likelihood_diff": 3.0, "pct_stereotype": 0.6}, 0.6),
        ({"exact_match[flexible-extract]": 0.3, "exact_match[strict-match]": 0.2}, 0.2),
        ({"exact_match[get-answer]": 0.7, "exact_match[get-answer]_stderr": 0.1}, 0.7),
        ({"exact_match[b]": 0.7, "exact_match[a]": 0.3}, 0.3),  # in any order that lm-eval reports them
        ({"f1": 0.6, "em": 0.4}, 0.4),
        ({"pass@1[create_test]": 0.3}, 0.3),
        ({"acc": 0, "acc_norm": 0}, 0.0),
        ({"exact": 61.2, "f1": 75.0, "HasAns_exact": 60.1, "HasAns_f1": 74.9}, 0.75),  # squadv2, in percent
        ({"word_perplexity": 12.0, "byte_perplexity": 2.0}, None),
        ({}, None),
    ],
)
def test_headline(metrics, expected):
    assert headline(metrics) == expected


def test_a_missing_score_stays_missing():
    assert headline({"acc_norm": None, "acc": 0.4}) is None


def test_averages_leave_bias_apart():
    tasks = {"arc_easy": {"acc_norm": 0.4}, "boolq": {"acc": 0.8}, "crows_pairs_english": {"pct_stereotype": 0.6}}
    with_crows, without_crows = averages(tasks)
    assert with_crows == pytest.approx(0.6)
    assert without_crows == pytest.approx(0.6)
    del tasks["boolq"]
    assert averages(tasks) == (pytest.approx(0.5), pytest.approx(0.4))


def test_averages_of_incomplete_rows_are_missing():
    assert averages({}) == (None, None)
    assert averages({"a": {"acc": 0.5}, "b": {"acc": None}}) == (None, None)
    assert averages({"a": {"acc": 0.5}, "crows_pairs_french": {}}) == (None, 0.5)
    assert averages({"crows_pairs_english": {"pct_stereotype": 0.5}}) == (0.5, None)


def test_perplexities_are_not_averaged_with_scores():
    assert averages({"a": {"acc": 0.5}, "wikitext": {"word_perplexity": 20.0}}) == (0.5, 0.5)
    assert averages({"wikitext": {"word_perplexity": 20.0}}) == (None, None)


def test_errors_of_averages_are_those_of_independent_tasks():
    tasks = {"a": {"acc": 0.5, "acc_stderr": 0.03}, "b": {"acc_norm": 0.7, "acc_norm_stderr": 0.04}}
    bias = {"crows_pairs_english": {"pct_stereotype": 0.6, "pct_stereotype_stderr": 0.12}}
    assert average_errors(tasks) == (pytest.approx(0.025), pytest.approx(0.025))
    assert average_errors(tasks | bias) == (pytest.approx(0.13 / 3), pytest.approx(0.025))
    assert average_errors(tasks | {"wikitext": {"word_perplexity": 20.0}}) == average_errors(tasks)
    assert average_errors(tasks | {"c": {"acc": 0.5, "acc_stderr": None}}) == (None, None)
    assert average_errors(tasks | {"c": {}}) == average_errors({}) == (None, None)


def test_the_error_is_that_of_the_headline():
    assert headline_error({"acc": 0.4, "acc_norm": 0.5, "acc_norm_stderr": 0.1, "acc_stderr": 0.2}) == 0.1
    assert headline_error({"exact_match[strict]": 0.4, "exact_match[strict]_stderr": 0.3}) == 0.3
    assert headline_error({"f1": 0.4}) is None
    assert headline_error({"f1": 75.0, "f1_stderr": 1.5, "HasAns_f1": 74.9}) == 0.015

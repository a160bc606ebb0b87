"""Scores of constant answers, against models that give them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.results.floors import average_floors, floor_of, floors_of


def details(**tasks):
    """Return an evaluation's own results from a task or group -> member -> positions of right answers."""
    return {
        "tasks": {
            task: {"right_answers": members, "n-samples": {name: {} for name in members}}
            for task, members in tasks.items()
        }
    }


@given(st.lists(st.integers(0, 4), min_size=1))
def test_it_is_the_best_of_all_constant_answers(answers):
    counts = [answers.count(place) for place in range(max(answers) + 1)]
    best = max(sum(answer == constant for answer in answers) / len(answers) for constant in range(5))
    assert floor_of(counts) == (best if len(set(answers)) > 1 else None)
    assert floor_of([]) is None, "a task without documents"


def test_tasks_and_groups_have_floors_where_answers_are_chosen():
    scores = {"piqa": {"acc": 0.7, "acc_norm": 0.8}, "mmlu": {"acc": 0.4}, "crows_pairs": {"pct_stereotype": 0.6}}
    scores |= {"wikitext": {"word_perplexity": 9.0}, "truthful": {"acc": 0.3}, "old": {"acc": 0.5}}
    told = details(piqa={"piqa": [3, 5]}, mmlu={"a": [1, 3], "b": [4, 0, 2]}, crows_pairs={"crows_pairs": [9, 1]})
    told["tasks"] |= details(truthful={"truthful": [12]})["tasks"] | {"old": {"n-samples": {"old": {}}}}
    assert floors_of(scores, told) == {"piqa": 5 / 8, "mmlu": 5 / 10}
    half = details(mmlu={"a": [1, 3]})
    half["tasks"]["mmlu"]["n-samples"]["b"] = {}
    assert floors_of(scores, half) == {}, "not of a group with a member that has none"
    assert floors_of({"a": {"acc": 1.0}}, told) == {"a": 3 / 4}, "of a tag's member"
    assert floors_of(scores, {}) == {}, "older evaluations"


def test_averages_have_floors_where_all_their_tasks_do():
    tasks = {"a": {"acc": 0.5}, "b": {"acc": 0.5}, "crows_pairs_x": {"pct_stereotype": 0.5}, "w": {"perplexity": 3.0}}
    assert average_floors(tasks, {"a": 0.25, "b": 0.5}) == (None, pytest.approx(0.375))
    assert average_floors(tasks, {"a": 0.25}) == (None, None)
    del tasks["crows_pairs_x"]
    assert average_floors(tasks, {"a": 0.25, "b": 0.5}) == (0.375, 0.375)

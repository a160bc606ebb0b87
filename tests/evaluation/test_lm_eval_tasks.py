import pytest

from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, clean_metrics, details_of, plain, scores_of
from hfprune_dist.results.headline import averages


def test_a_data_set_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nafter 5 tries")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    loader = TaskLoader(["arc_easy"], None, tmp_path)
    with pytest.raises(
        UserError, match=r"task 'arc_easy' .* can't be loaded: ConnectionError: Couldn't reach the hub after 5"
    ):
        loader.load("arc_easy", 0)


def test_tasks_are_loaded_below_a_long_path_in_any_script(tmp_path):
    """The datasets library names its locks after such a path, which has few characters and many bytes."""
    task = 'task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: "mine.jsonl"}}\ntest_split: test\n'
    (tmp_path / "mine.yaml").write_text(f'{task}doc_to_text: "{{{{text}}}}"\ndoc_to_target: "{{{{text}}}}"\n')
    (tmp_path / "mine.jsonl").write_text('{"text": "a b"}\n')
    cache = tmp_path / ("模型" * 20) / ("剪枝" * 20) / "datasets"
    assert len(str(cache)) < 255 < len(str(cache).encode())
    loaded = TaskLoader(["mine"], tmp_path, cache).load("mine", 0)
    assert loaded["tasks"]["mine"].eval_docs[0] == {"text": "a b"}


def test_metric_names_are_readable():
    raw = {
        "alias": "x",
        "sample_len": 3,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict-match": 1,
        "exact_match_stderr,strict-match": "N/A",
    }
    assert clean_metrics(raw) == {
        "acc": 0.5,
        "acc_stderr": 0.1,
        "exact_match[strict-match]": 1,
        "exact_match[strict-match]_stderr": None,
    }


def test_scores_of_groups_and_tags():
    tasks = {"a": {"acc,none": 0.4}, "b": {"acc,none": 0.6}, "c": {"acc,none": 0.2}}
    inner = {"alias": "inner", "acc,none": 0.5}
    group = {"results": tasks | {"inner": inner}, "group_subtasks": {"inner": ["a", "b"]}}
    assert scores_of("inner", group) == {"inner": {"acc": 0.5}}
    tag = {"results": {"b": tasks["b"], "a": tasks["a"]}, "group_subtasks": {}}
    assert scores_of("t", tag) == {"a": {"acc": 0.4}, "b": {"acc": 0.6}}
    unweighted = {"results": {"g": {"alias": "g"}, "a": tasks["a"]}, "group_subtasks": {"g": ["a"]}}
    assert scores_of("g", unweighted) == {"a": {"acc": 0.4}}


def test_an_average_counts_no_member_of_a_group_twice():
    results = {task: {"acc,none": 0.0} for task in ("a", "b")} | {"c": {"acc,none": 1.0}}
    results |= {"outer": {"alias": "outer"}, "inner": {"acc,none": 0.0}, "middle": {"alias": "middle"}}
    members = {"outer": ["middle", "c"], "middle": ["inner"], "inner": ["a", "b"]}
    scores = scores_of("outer", {"results": results, "group_subtasks": members})
    assert scores == {"inner": {"acc": 0.0}, "c": {"acc": 1.0}}
    assert averages(scores)[0] == 0.5


def test_values_become_json():
    import numpy as np

    assert plain({1: (float("nan"), float("inf"), np.float64(0.5), np.int64(2), True, None, len, {"x"})}) == {
        "1": [None, None, 0.5, 2, True, None, "len", ["x"]]
    }
    of_classes = plain({"f1,none": np.array([0.5, float("nan")])})  # as a task's own aggregation may return it
    assert of_classes == {"f1,none": [0.5, None]} and clean_metrics(of_classes) == {"f1": None}


def test_the_configuration_is_kept_as_a_hash():
    result = {"results": {"a": {}}, "configs": {"a": {"x": 1}}, "versions": {"a": 1}, "n-shot": {"a": 0}}
    details = details_of(result)
    assert set(details) == {"results", "versions", "n-shot", "config_hashes"}
    assert details["config_hashes"] != details_of(result | {"configs": {"a": {"x": 2}}})["config_hashes"]

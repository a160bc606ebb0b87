"""lm-eval's tasks: which exist, loading them, and what is kept of their results."""

import json

import numpy as np
import pytest
from lm_eval.tasks import TaskManager

from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation import lm_eval_tasks
from hfprune_dist.evaluation.lm_eval_tasks import (
    TaskLoader,
    check_tasks,
    clean_metrics,
    plain,
    scores_of,
)

DATA = "dataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
CHOICE = f"{DATA}output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: l\n"
OWN = {
    "a": f"task: a\ntag: tag\n{CHOICE}",
    "b": f"task: b\ntag: [tag]\n{CHOICE}",
    "quiet": "group: quiet\ntask: [a, {group: inline, task: [b]}]\n",
    "absent": f"task: absent\n{CHOICE}".replace("data.json", "absent.json"),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of tasks; of lm-eval's own, whose index takes ten seconds, only the plain ones are read here."""

    def without(include_path=None, include_defaults=False):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without)
    lm_eval_tasks._open_index.cache_clear()
    for name, text in OWN.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    documents = [{"q": "x", "c": ["y", "z"], "l": 0}] * 2
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    yield tmp_path
    lm_eval_tasks._open_index.cache_clear()


def test_tasks_groups_and_tags_are_known(own):
    check_tasks(EvaluationConfig().tasks, None, data=False)
    for tasks in (["a", "arc_easy"], ["tag"], ["quiet"]):
        check_tasks(tasks, own, data=False)


def test_tasks_that_run_code_are_refused(own):
    with pytest.raises(UserError, match=r"evaluation.tasks: humaneval: they run code"):
        check_tasks(["arc_easy", "humaneval"], own, data=False)


def test_unknown_names_are_listed_with_close_ones(own):
    with pytest.raises(UserError) as caught:
        check_tasks(["quite", "qqqq", "a"], own)
    message = str(caught.value)
    assert "unknown task 'quite'; did you mean 'quiet'?" in message
    assert "unknown task 'qqqq'\n" in message and "'a'" not in message


def test_a_task_whose_data_set_cannot_be_had_is_named(own, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (own / "far.yaml").write_text(f"task: far\n{CHOICE}".replace("path: json", "path: nobody/nothing-of-this-name"))
    check_tasks(["a", "absent"], own)
    with pytest.raises(UserError, match=r"tasks: far: its data set 'nobody/nothing-of-this-name' is not in the cache"):
        check_tasks(["a", "far"], own)


def test_a_group_is_loaded_with_its_members_and_their_data(own, tmp_path):
    loader = TaskLoader(["quiet", "absent"], own, tmp_path / "cache")
    tasks = loader.load("quiet", 1)["tasks"]
    assert set(tasks) == {"a", "b"} and {it.config.num_fewshot for it in tasks.values()} == {1}
    with pytest.raises(UserError, match=r"task 'absent' \(.*absent.yaml\) can't be loaded: .*absent.json"):
        loader.load("absent", 0)


def test_metric_names_are_readable():
    raw = {"alias": "x", "sample_len": 3, "acc,none": 0.5, "acc_stderr,none": 0.1}
    raw |= {"exact_match,strict-match": 1, "exact_match_stderr,strict-match": "N/A"}
    exact = {"exact_match[strict-match]": 1, "exact_match[strict-match]_stderr": None}
    assert clean_metrics(raw) == {"acc": 0.5, "acc_stderr": 0.1, **exact}


def test_scores_of_groups_and_tags():
    tasks = {"a": {"acc,none": 0.4}, "b": {"acc,none": 0.6}, "c": {"acc,none": 0.2}}
    inner = {"alias": "inner", "acc,none": 0.5}
    group = {"results": tasks | {"inner": inner}, "group_subtasks": {"inner": ["a", "b"]}}
    assert scores_of("inner", group) == {"inner": {"acc": 0.5}}
    tag = {"results": {"b": tasks["b"], "a": tasks["a"]}, "group_subtasks": {}}
    assert scores_of("t", tag) == {"a": {"acc": 0.4}, "b": {"acc": 0.6}}
    nested = {"outer": {"alias": "outer"}, "inner": inner, "middle": {"alias": "middle"}} | tasks
    members = {"outer": ["middle", "c"], "middle": ["inner"], "inner": ["a", "b"]}
    scores = scores_of("outer", {"results": nested, "group_subtasks": members})
    assert scores == {"inner": {"acc": 0.5}, "c": {"acc": 0.2}}, "no member of a group counts twice"


def test_values_become_json():
    assert plain({1: (float("nan"), float("inf"), np.float64(0.5), np.int64(2), True, None, len, {"x"})}) == {
        "1": [None, None, 0.5, 2, True, None, "len", ["x"]]
    }
    of_classes = plain({"f1,none": np.array([0.5, float("nan")])})  # as a task's own aggregation may return it
    assert of_classes == {"f1,none": [0.5, None]} and clean_metrics(of_classes) == {"f1": None}

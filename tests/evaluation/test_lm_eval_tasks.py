import pytest

from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation import lm_eval_tasks as evaluation
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, check_tasks, clean_metrics, details_of, plain, scores_of
from hfprune_dist.results.headline import averages

TASK = """
task: my_task
tag: my_tag
dataset_path: json
doc_to_text: !function helpers.prompt
"""
GROUP = """
group: my_group
task:
  - my_task
  - task: arc_easy
    num_fewshot: 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "one.yaml").write_text(TASK)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "two.yaml").write_text(GROUP)
    return tmp_path


@pytest.fixture
def no_full_index(monkeypatch):
    """Fail if lm-eval's own index, which takes ten seconds, is opened."""

    def refuse(folders, include_path):
        pytest.fail("opened lm-eval's whole index")

    monkeypatch.setattr(evaluation, "_open_index", refuse)


def test_the_paper_suite_is_known(no_full_index):
    check_tasks(EvaluationConfig().tasks, None)


def test_groups_of_lm_eval_are_known(no_full_index):
    check_tasks(["mmlu", "gsm8k", "wikitext"], None)


def test_own_tasks_are_known_without_lm_eval(own, no_full_index, monkeypatch):
    monkeypatch.setattr(evaluation, "shipped_definitions", lambda: pytest.fail("searched lm-eval's tasks"))
    check_tasks(["my_task", "my_tag"], own)


def test_groups_with_members_of_lm_eval_are_known(own, no_full_index):
    check_tasks(["my_group", "tinyBenchmarks"], own)


def test_a_group_of_which_lm_eval_scores_only_some_tasks_is_refused(no_full_index):
    with pytest.raises(UserError, match=r"in group 'openllm' \(.*openllm.yaml\), lm-eval gives all tasks of mmlu one"):
        check_tasks(["piqa", "openllm"], None)


class Index:
    """A stand-in for lm-eval's index that is instantly ready."""

    task_index = dict.fromkeys(["arc_easy", "arc_challenge", "ai2_arc"])


@pytest.mark.parametrize(
    ("task", "needs"), [("humaneval", "runs code"), ("mbpp_instruct", "runs code"), ("mmmu_val", "shows images")]
)
def test_tasks_that_lm_eval_would_refuse_later_are_refused_at_once(no_full_index, task, needs):
    """Also with included settings, or in groups of groups."""
    with pytest.raises(UserError, match=rf"'{task}' \(.*yaml\) {needs}.* isn't done here"):
        check_tasks(["arc_easy", task], None)


def test_a_task_that_leaves_out_the_images_of_one_that_it_includes_is_evaluated(own, no_full_index):
    """As by lm-eval, which takes ``doc_to_image: null`` as without images, but ``unsafe_code: null`` as with code."""
    (own / "base").write_text("doc_to_image: picture\ndoc_to_audio: sound\nunsafe_code: true\n")
    settings = "include: base\ntask: my_text\ndoc_to_image: null\ndoc_to_audio: null\nunsafe_code: "
    (own / "text.yaml").write_text(f"{settings}false\n")
    check_tasks(["my_text"], own)
    (own / "text.yaml").write_text(f"{settings}null\n")
    with pytest.raises(UserError, match=r"'my_text' \(.* runs code"):
        check_tasks(["my_text"], own)


def test_unknown_names_are_listed_with_close_ones(own, monkeypatch):
    monkeypatch.setattr(evaluation, "_open_index", lambda folders, include_path: Index)
    (own / "broken.yaml").write_text("task: [")
    with pytest.raises(UserError) as caught:
        check_tasks(["arc_esy", "my_tusk", "ai2_arc", "qqqq"], own)
    message = str(caught.value)
    assert "unknown task 'arc_esy'; did you mean 'arc_easy'?" in message
    assert "unknown task 'my_tusk'; did you mean 'my_task'?" in message
    assert "unknown task 'qqqq'\n" in message
    assert "broken.yaml: can't be read" in message
    assert "ai2_arc" not in message


@pytest.mark.parametrize(
    ("tasks", "folders"),
    [
        (["my_task"], []),
        (["my_group"], ["arc"]),
        (["my_task", "arc_easy", "piqa"], ["arc", "piqa"]),
        (["my_tag"], None),
        (["mmlu"], None),
        (["nowhere"], None),
    ],
)
def test_only_the_folders_that_matter_are_indexed(own, tasks, folders):
    definitions, _ = evaluation.own_definitions(own)
    found = evaluation._folders_of(tasks, definitions)
    assert (None if found is None else [folder.name for folder in found]) == folders


def test_a_data_set_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nafter 5 tries")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    loader = TaskLoader(["arc_easy"], None, tmp_path)
    with pytest.raises(
        UserError, match="task 'arc_easy' can't be loaded: ConnectionError: Couldn't reach the hub after 5"
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

"""What is known of tasks before any model is made: which exist, which can be loaded, and in which the model writes."""

import json

import pytest
import yaml
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation import task_index
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, check_tasks
from hfprune_dist.evaluation.task_index import generating_tasks, require_room_for_answers

DATA = "dataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
CHOICE = f"{DATA}output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: l\n"
OWN = {
    "a": f"task: a\ntag: tag\n{CHOICE}",
    "b": f"task: b\ntag: [tag]\n{CHOICE}",
    "writes": "task: writes\ndataset_path: x\n",
    "inherits": "task: inherits\ninclude: base.yml\n",
    "class": "task: class\nclass: !function code.Task\n",
    "group": "group: group\ntask: [a, inner]\n",
    "inner": "group: inner\ntask: [{task: writes, num_fewshot: 2}]\n",
    "quiet": "group: quiet\ntask: [a, {group: inline, task: [b]}]\n",
    "code": "task: code\ndataset_path: x\nunsafe_code: true\n",
    "around": "group: around\ntask: [code]\n",
    "lossy": "group: lossy\ntask: [{task: tag, num_fewshot: 0}]\n",
    "hollow": "group: hollow\ntask: []\n",
    "unlisted": "group: unlisted\ntask: [a, nowhere]\n",
    "absent": f"task: absent\n{CHOICE}".replace("data.json", "absent.json"),
}


@pytest.fixture(autouse=True)
def no_full_index(monkeypatch):
    """lm-eval's own files take ten seconds; only those of its plain tasks are read here."""

    def without(include_path=None, include_defaults=False):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without)
    task_index._open_index.cache_clear()
    yield
    task_index._open_index.cache_clear()


@pytest.fixture
def own(tmp_path):
    for name, text in OWN.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "base.yml").write_text("output_type: loglikelihood\n")
    documents = [{"q": "x", "c": ["y", "z"], "l": 0}] * 2
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    return tmp_path


def test_the_paper_suite_is_known():
    check_tasks(EvaluationConfig().tasks, None, 0)


@pytest.mark.parametrize("task", ["a", "tag", "quiet", "group"])
def test_own_tasks_groups_and_tags_are_known(own, task):
    check_tasks([task, "arc_easy"][: 1 if task != "a" else 2], own, 0)


def test_unknown_names_are_listed_with_close_ones(own):
    with pytest.raises(UserError) as caught:
        check_tasks(["quite", "qqqq", "a"], own, 0)
    message = str(caught.value)
    assert "unknown task 'quite'; did you mean 'quiet'?" in message
    assert "unknown task 'qqqq'\n" in message and "'a'" not in message


@pytest.mark.parametrize(
    ("task", "examples", "message"),
    [
        *(("code", 0, "'code' .*code.yaml. runs code"), ("around", 0, "'around' .*code.yaml. runs code")),
        ("absent", 0, "task 'absent' .*absent.yaml.* can't be loaded: .*absent.json"),
        ("lossy", 0, "'lossy': lm-eval gives all tasks of 'tag' one name"),
        *(
            ("hollow", 0, "'hollow' is a group without members"),
            ("unlisted", 0, r"unknown task 'nowhere' \(listed in .*unlisted.yaml\)"),
        ),
        ("a", 3, "task 'a' is to show more examples, 3, than .* at most 2"),
    ],
)
def test_tasks_that_can_not_be_evaluated_are_refused_at_once(own, task, examples, message):
    check_tasks(["b"], own, 1)
    with pytest.raises(UserError, match=message):
        check_tasks([task], own, examples)


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(UserError, match="include_path: no task is defined in"):
        check_tasks(["arc_easy"], tmp_path, 0)


def test_in_which_tasks_the_model_writes(own):
    asked = ["writes", "a", "inherits", "class", "group", "inner", "quiet", "tag"]
    assert generating_tasks(asked, own) == ["writes", "group", "inner"]
    asked = ["gsm8k", "arc_easy", "triviaqa", "nq_open", "wikitext", "hellaswag"]
    assert generating_tasks(asked, None) == ["gsm8k", "triviaqa", "nq_open"]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        *((f"{{{key}: 40}}", 40) for key in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")),
        ("{max_tokens: 7, max_gen_toks: null, max_new_tokens: 30, until: [x]}", 30),
        *(("{until: [x]}", 256), ("null", 256)),
    ],
)
def test_an_answer_as_long_as_all_that_a_model_reads_is_refused(tmp_path, options, tokens):
    assert normalize_gen_kwargs(yaml.safe_load(options) or {})["max_gen_toks"] == tokens, "as lm-eval counts"
    (tmp_path / "long.yaml").write_text(f"task: long\ndataset_path: x\ngeneration_kwargs: {options}\n")
    (tmp_path / "choice.yaml").write_text("task: choice\noutput_type: multiple_choice\n")
    require_room_for_answers(["choice", "long"], tmp_path, tokens + 1, tmp_path)
    with pytest.raises(UserError, match=f"'long' .* may have {tokens} tokens .* reads {tokens}, prompt included"):
        require_room_for_answers(["choice", "long"], tmp_path, tokens, tmp_path)


def test_a_group_whose_members_keep_their_names_is_loaded_whole(own, tmp_path):
    assert set(TaskLoader(["quiet"], own, tmp_path / "cache").load("quiet", 0)["tasks"]) == {"a", "b"}

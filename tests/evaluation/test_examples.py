"""Examples that a task has no documents for, found in its files, or when it is loaded, instead of in lm-eval."""

import gzip
import json

import pytest
import yaml

from hfprune_dist.errors import UserError
from hfprune_dist.evaluation import lm_eval_tasks
from hfprune_dist.evaluation.examples import check_examples
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader

ROWS = [{"text": f"question {number}", "answer": "a"} for number in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TRAIN = {"train": "six.jsonl", "test": "three.jsonl"}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "six.jsonl").write_text(LINES)
    (folder / "three.jsonl").write_text("".join(LINES.splitlines(keepends=True)[:3]))
    (folder / "list.json").write_text(json.dumps(ROWS, indent=1))
    (folder / "spaced.jsonl").write_text(LINES.replace("\n", "\n\n"))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "six.csv").write_text("text,answer\n" + "x,a\n" * 6)
    (folder / "code.py").write_text("def twice(docs):\n    return docs.select([*range(len(docs))] * 2)\n")
    return folder


def write(folder, data_files, name="mine", **settings):
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": data_files}, "test_split": "test"}
    task |= {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}"}
    text = yaml.safe_dump({**task, **settings})
    (folder / f"{name}.yaml").write_text(text.replace("'!function code.twice'", "!function code.twice"))


def is_refused_by_files(folder, number, tasks=("mine",)):
    try:
        check_examples(tasks, folder, number)
    except UserError as refusal:
        assert "evaluation.num_fewshot: task 'mine'" in str(refusal)
        return True
    return False


def is_refused_when_loaded(folder, number, name="mine"):
    try:
        TaskLoader([name], folder, folder.parent / "cache").load(name, number)
    except UserError as refusal:
        assert "evaluation.num_fewshot: task 'mine'" in str(refusal)
        return True
    return False


def fails_in_lm_eval(folder, number, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lm_eval_tasks, "require_examples", lambda *_: None)
        task = TaskLoader(["mine"], folder, folder.parent / "cache").load("mine", number)["tasks"]["mine"]
    try:
        for document in task.eval_docs:
            task.fewshot_context(document, task.config.num_fewshot)
    except (ValueError, AssertionError):
        return True
    return False


# Tasks with the most examples that they can show, and whether their files tell.
TASKS = {
    "training split": (TRAIN, {"training_split": "train"}, 6, True),
    "split for examples": (TRAIN, {"training_split": "test", "fewshot_split": "train"}, 6, True),
    "validation split": (TRAIN, {"validation_split": "train"}, 6, True),
    "no other split": ({"test": "six.jsonl"}, {}, 6, True),
    "split that is evaluated": ({"test": "six.jsonl"}, {"fewshot_split": "test"}, 5, True),
    "no split to test": (TRAIN, {"test_split": None, "validation_split": "train"}, 5, True),
    "files without a split": ("six.jsonl", {"test_split": "train"}, 6, True),
    "several files": ({"test": ["six.jsonl", "three.jsonl"]}, {}, 9, True),
    "pattern": ({"test": "s*x.jsonl"}, {}, 6, True),
    "list": ({"test": "list.json"}, {}, 6, True),
    "blank lines": ({"test": "spaced.jsonl"}, {}, 6, True),
    "first ones": (TRAIN, {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}, 6, True),
    "samples": (TRAIN, {"fewshot_config": {"samples": ROWS[:2]}}, 2, True),
    "split before samples": (TRAIN, {"fewshot_config": {"samples": ROWS[:2], "split": "train"}}, 6, True),
    "packed": ({"test": "packed.jsonl.gz"}, {}, 6, False),
    "csv": ({"test": "six.csv"}, {"dataset_path": "csv"}, 6, False),
    "code": ({"test": "six.jsonl"}, {"process_docs": "!function code.twice"}, 12, False),
}


@pytest.mark.parametrize("case", TASKS)
def test_what_lm_eval_cannot_draw_is_refused_and_nothing_else(folder, monkeypatch, case):
    data_files, settings, most, told = TASKS[case]
    write(folder, data_files, **settings)
    for number in (0, most, most + 1, 100):
        impossible = number > most
        assert is_refused_by_files(folder, number) == (impossible and told)
        assert is_refused_when_loaded(folder, number) == impossible
        assert fails_in_lm_eval(folder, number, monkeypatch) == impossible


@pytest.mark.parametrize(
    ("usual", "number", "refused"),
    [(None, 7, True), (None, None, False), (7, None, True), (7, 6, False), (6, None, False), (0, 7, False)],
)
def test_the_number_is_the_one_that_is_shown(folder, usual, number, refused):
    write(folder, {"test": "six.jsonl"}, **({} if usual is None else {"num_fewshot": usual}))
    assert is_refused_by_files(folder, number) == is_refused_when_loaded(folder, number) == refused


def test_the_message_says_how_many_there_are(folder):
    write(folder, {"test": "six.jsonl"}, fewshot_split="test")
    expected = r"'mine' is to show more examples, 100, than .* \(besides the one being evaluated\); choose at most 5$"
    for refuse in (
        lambda: check_examples(["mine"], folder, 100),
        lambda: TaskLoader(["mine"], folder, folder.parent / "cache").load("mine", 100),
    ):
        with pytest.raises(UserError, match=f"evaluation.num_fewshot: task {expected}"):
            refuse()


@pytest.mark.parametrize(
    ("group", "by_files", "when_loaded"),
    [
        ({"task": ["mine"]}, True, True),
        ({"task": ["inner"]}, True, True),
        ({"task": ["mine"], "num_fewshot": 0}, False, False),
        ({"task": [{"task": "mine", "num_fewshot": 0}]}, False, False),
        ({"task": [{"task": "mine", "fewshot_split": "test"}]}, False, True),
    ],
)
def test_members_of_groups(folder, group, by_files, when_loaded):
    write(folder, {"test": "six.jsonl"})
    (folder / "inner.yaml").write_text("group: inner\ntask: [mine]\nmetadata: {version: 1}\n")
    (folder / "outer.yaml").write_text(yaml.safe_dump({"group": "outer", **group}))
    assert is_refused_by_files(folder, 7, ["outer"]) == by_files
    assert is_refused_when_loaded(folder, 7, "outer") == when_loaded


@pytest.mark.parametrize(
    "text", ['{"text":\n"x"}\n' * 2, '{"text": "x"}{"text": "y"}\n', "5\n6\n", '"a"\n', "{\n", "\ufeff[]", "[1\n"]
)
def test_files_whose_documents_cannot_be_counted_tell_nothing(folder, text):
    (folder / "odd.json").write_text(text)
    write(folder, {"test": "odd.json"})
    assert not is_refused_by_files(folder, 100)


@pytest.mark.parametrize("options", [{"field": "rows"}, {"data_files": None}, {"data_files": {"test": "https://a/b"}}])
def test_data_that_is_read_in_another_way_tells_nothing(folder, options):
    write(folder, None, dataset_kwargs={"data_files": {"test": "six.jsonl"}, **options})
    assert not is_refused_by_files(folder, 100)


def test_only_as_many_documents_are_read_as_are_wanted(folder):
    (folder / "long.jsonl").write_text(LINES + "not JSON\n")
    write(folder, {"test": "long.jsonl"})
    assert not is_refused_by_files(folder, 5)
    assert not is_refused_by_files(folder, 100), "damaged"

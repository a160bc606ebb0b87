"""Files that the user's tasks read outside their folder, found without lm-eval."""

import json

import pytest
import yaml

from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader
from hfprune_dist.planning.task_files import outside_files

LINE = '{"text": "a", "answer": "b"}\n'


@pytest.fixture
def folder(tmp_path):
    """A folder of tasks beside one with data, each with files of the same names."""
    for name in ("tasks", "data", "data/sub"):
        (tmp_path / name).mkdir()
        for file in ("a.jsonl", "b.jsonl"):
            (tmp_path / name / file).write_text(LINE)
    return tmp_path / "tasks"


def write(folder, name="mine.yaml", **settings):
    (folder / name).write_text(yaml.safe_dump({"task": "mine", "dataset_path": "json", **settings}))


def found(folder):
    return [str(file.relative_to(folder.parent.resolve())) for file in outside_files(folder)]


DATA = {
    "inside": ("a.jsonl", []),
    "one": ("../data/a.jsonl", ["data/a.jsonl"]),
    "list": (["../data/b.jsonl", "a.jsonl", "../data/a.jsonl"], ["data/a.jsonl", "data/b.jsonl"]),
    "splits": ({"train": "../data/a.jsonl", "test": ["../data/b.jsonl"]}, ["data/a.jsonl", "data/b.jsonl"]),
    "pattern": ("../data/*", ["data/a.jsonl", "data/b.jsonl"]),
    "all below": (
        "../data/**/*.jsonl",
        ["data/a.jsonl", "data/b.jsonl", "data/sub/a.jsonl", "data/sub/b.jsonl"],
    ),
    "absolute": ("{above}/data/a.jsonl", ["data/a.jsonl"]),
    "local url": ("file://{above}/data/a.jsonl", ["data/a.jsonl"]),
    "archive": ("zip://x.json::../data/a.jsonl", ["data/a.jsonl"]),
    "url": ("https://example.org/a.jsonl", []),
    "around": ("../tasks/a.jsonl", []),
    "missing": ("../data/none.jsonl", []),
    "not paths": ([5, None, {"a": True}], []),
}


def filled(value, above):
    return json.loads(json.dumps(value).replace("{above}", str(above)))


@pytest.mark.parametrize(("data_files", "expected"), DATA.values(), ids=DATA)
def test_data_files(folder, data_files, expected):
    write(folder, dataset_kwargs={"data_files": filled(data_files, folder.parent)})
    assert found(folder) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dataset_kwargs": {"data_dir": "../data/sub"}}, ["data/sub/a.jsonl", "data/sub/b.jsonl"]),
        ({"dataset_kwargs": {"data_dir": "../data", "data_files": "sub/a.jsonl"}}, ["data/sub/a.jsonl"]),
        ({"dataset_path": "../data/sub"}, ["data/sub/a.jsonl", "data/sub/b.jsonl"]),
        ({"dataset_path": "../data", "dataset_kwargs": {"data_files": {"test": "b.jsonl"}}}, ["data/b.jsonl"]),
        ({"dataset_path": "org/name", "dataset_kwargs": {"data_dir": "main"}}, []),
        ({"dataset_path": None, "dataset_kwargs": [1]}, []),
    ],
)
def test_folders_of_data(folder, settings, expected):
    write(folder, **settings)
    assert found(folder) == expected


def test_what_the_folders_digest_leaves_out_counts_where_it_is_named(folder):
    (folder / ".hidden.jsonl").write_text(LINE)
    write(folder, dataset_kwargs={"data_files": ".hidden.jsonl"})
    assert found(folder) == ["tasks/.hidden.jsonl"]


def test_a_link_is_followed_by_the_folders_digest(folder):
    (folder / "link.jsonl").symlink_to(folder.parent / "data" / "a.jsonl")
    write(folder, dataset_kwargs={"data_files": ["link.jsonl", "../data/a.jsonl"]})
    assert found(folder) == []


def test_included_files_their_includes_functions_and_data(folder):
    data = folder.parent / "data"
    (data / "base.yml").write_text("include: sub/deep.yml\ndoc_to_text: !function code.text\n")
    (data / "sub" / "deep.yml").write_text("dataset_kwargs: {data_files: ../data/b.jsonl}\nclass: !function x.y.Task\n")
    for module in ("code.py", "other.py"):
        (data / module).write_text("")
    (folder / "code.py").write_text("")
    write(folder, include=["../data/base.yml"], doc_to_target="!function code.target")
    assert found(folder) == ["data/b.jsonl", "data/base.yml", "data/code.py", "data/sub/deep.yml"]


def test_a_link_to_a_task_is_read_where_it_leads(folder, tmp_path):
    """As by lm-eval: what it includes lies beside the file that it leads to."""
    data = folder.parent / "data"
    (data / "base.yml").write_text("dataset_path: json\ndataset_kwargs: {data_files: {test: a.jsonl}}\n")
    (data / "task.yaml").write_text(
        'task: mine\ninclude: base.yml\ntest_split: test\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{answer}}"\n'
    )
    (folder / "task.yaml").symlink_to(data / "task.yaml")
    assert "data/base.yml" in found(folder)
    assert len(TaskLoader(["mine"], folder, tmp_path / "cache").load("mine", 0)["tasks"]["mine"].eval_docs) == 1


def test_groups_with_settings_and_tasks_of_their_own(folder):
    inner = {"task": "inner", "dataset_path": "json", "dataset_kwargs": {"data_files": "../data/sub/b.jsonl"}}
    members = ["plain", {"task": "mine", "dataset_kwargs": {"data_files": "../data/a.jsonl"}}]
    group = {"group": "all", "task": [*members, {"group": "below", "task": [inner]}]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    assert found(folder) == ["data/a.jsonl", "data/sub/b.jsonl"]


@pytest.mark.parametrize(
    "text", ["task: [", "", "- 1", "5", "task: x\ninclude: none.yml", "task: x\ninclude: odd.yaml"]
)
def test_tasks_that_cannot_be_read_hide_no_others(folder, text):
    (folder / "odd.yaml").write_text(text)
    write(folder, dataset_kwargs={"data_files": "../data/a.jsonl"})
    assert found(folder) == ["data/a.jsonl"]


@pytest.mark.parametrize("name", [name for name in DATA if name not in ("url", "missing", "not paths", "archive")])
def test_the_data_sets_library_finds_the_same(folder, tmp_path, name, monkeypatch):
    """It resolves paths from the current folder, which is that of the tasks."""
    import datasets

    data_files = filled(DATA[name][0], folder.parent)
    monkeypatch.chdir(folder)
    loaded = datasets.load_dataset("json", data_files=data_files, cache_dir=str(tmp_path / "cache"))
    inside = {"inside": 1, "list": 1, "around": 1}.get(name, 0)
    assert sum(len(split) for split in loaded.values()) == len(DATA[name][1]) + inside

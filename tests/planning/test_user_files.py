"""The user's files are as planned when a stage begins and when it commits; files of tasks outside their folder."""

import pytest
import yaml
from made_stages import stage_of
from sweeps import make_inputs, planned

from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader
from hfprune_dist.planning.user_files import ChangedInputError, outside_files, require_planned
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input

WHEN = "since the sweep was planned"
# Kind of stage -> files that it reads, one of each sort.
READS = {
    "importance": ["alpha/model.safetensors", "alpha/tokenizer.json", "calibration.jsonl"],
    "evaluate": ["tasks/tiny_choice.jsonl", "data/more.jsonl", "data/base.yml"],
}
LINE = '{"text": "a", "answer": "b"}\n'


@pytest.fixture
def folder(tmp_path):
    """Everything that a sweep reads, tasks that read files elsewhere among it."""
    make_inputs(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "more.jsonl").write_text("{}\n")
    (tmp_path / "data" / "base.yml").write_text("output_type: multiple_choice\n")
    more = {"task": "more", "include": "../data/base.yml", "dataset_path": "json"}
    more["dataset_kwargs"] = {"data_files": {"test": "../data/more.jsonl"}}
    (tmp_path / "tasks" / "more.yaml").write_text(yaml.safe_dump(more))
    return tmp_path


def stages_in(folder):
    return {stage.kind: stage for stage in reversed(planned(folder / "tiny.yaml", models=["alpha"])[1].stages.values())}


def check(stage):
    require_planned(stage.inputs.values(), FileHashes(None), WHEN)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in READS.items() for name in names])
def test_a_change_is_refused_and_named_and_changes_the_fingerprint(folder, kind, name):
    stage, file = stages_in(folder)[kind], folder / name
    assert all(source.content for source in stage.inputs.values() if not source.is_stage)
    check(stage)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name.endswith("safetensors") else content + b" \n")
    with pytest.raises(
        ChangedInputError, match=rf"{name.split('/')[0].replace('data', 'tasks')}: changed {WHEN}; run the sweep again"
    ):
        check(stage)
    assert stages_in(folder)[kind].id != stage.id
    file.write_bytes(content)
    check(stage)
    assert stages_in(folder)[kind].id == stage.id
    file.unlink()
    with pytest.raises(UserError):
        check(stage)


@pytest.mark.parametrize("name", ["alpha/chat_template.jinja", "tasks/sub/more.yaml"])
def test_a_file_that_was_added_is_a_change(folder, name):
    before = stages_in(folder)["evaluate"]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    with pytest.raises(ChangedInputError, match=name.split("/")[0]):
        check(before)
    check(stages_in(folder)["evaluate"])


def test_a_commit_of_the_hub_only_has_to_be_there(folder):
    """Its files are named after their content, and never change."""
    pinned = stage_of("importance", "a", {}, {"model": Input("digest", str(folder / "alpha"), content="commit")})
    (folder / "alpha" / "generation_config.json").write_text("{}")
    check(pinned)
    (folder / "alpha" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"alpha.*safetensors"):
        check(pinned)


@pytest.fixture
def tasks(tmp_path):
    """A folder of tasks beside one with data, each with files of the same names."""
    for name in ("tasks", "data", "data/sub"):
        (tmp_path / name).mkdir()
        for file in ("a.jsonl", "b.jsonl"):
            (tmp_path / name / file).write_text(LINE)
    return tmp_path / "tasks"


def found(tasks, name="mine.yaml", **settings):
    (tasks / name).write_text(yaml.safe_dump({"task": "mine", "dataset_path": "json", **settings}))
    return [str(file.relative_to(tasks.parent.resolve())) for file in outside_files(tasks)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data_files": ["../data/b.jsonl", "a.jsonl", "../data/a.jsonl"]}, ["data/a.jsonl", "data/b.jsonl"]),
        ({"data_files": ["../tasks/a.jsonl", "../data/none.jsonl", "x" * 300, "\0", 5, None]}, []),
        ({"data_dir": "../data/sub", "name": ".."}, ["data/sub/a.jsonl", "data/sub/b.jsonl"]),
    ],
)
def test_data_files_are_found_where_the_datasets_library_finds_them(tasks, settings, expected):
    (tasks / "odd.yaml").write_text("task: [")  # which hides no others
    assert found(tasks, dataset_kwargs=settings) == expected


def test_included_files_and_links_are_read_where_they_lead(tasks, tmp_path):
    """As by lm-eval: what a linked task includes lies beside the file that the link leads to."""
    data = tasks.parent / "data"
    (tasks / "task.yaml").symlink_to(data / "task.yaml")
    (data / "base.yml").write_text("dataset_path: json\ndataset_kwargs: {data_files: {test: a.jsonl}}\n")
    (data / "task.yaml").write_text(
        'task: linked\ninclude: base.yml\ntest_split: test\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{answer}}"\n'
    )
    loaded = TaskLoader(["linked"], tasks, tmp_path / "cache").load("linked", 0)
    assert len(loaded["tasks"]["linked"].eval_docs) == 1
    assert found(tasks) == ["data/a.jsonl", "data/base.yml"]

"""The user's files are as planned when a stage begins, and still when it commits."""

import os
import time

import pytest
from made_stages import stage_of
from sweeps import make_inputs, planned

from hfprune_dist.errors import UserError
from hfprune_dist.planning.user_files import ChangedInputError, UserFiles, _changed_part
from hfprune_dist.store import hashing as identity
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input

PLANNED = "since the sweep was planned; run the sweep again"
# Kind of stage -> the files that it reads
READS = {
    "importance": ["alpha/model.safetensors", "alpha/config.json", "alpha/tokenizer.json", "calibration.jsonl"],
    "reference": ["alpha/model.safetensors", "heldout.jsonl"],
    "recover": ["alpha/model.safetensors", "pairs.jsonl"],
    "evaluate": ["alpha/model.safetensors", "tasks/choice.yaml", "tasks/choice.jsonl", "tasks/_utils.py"],
}


@pytest.fixture
def folder(tmp_path):
    make_inputs(tmp_path)
    (tmp_path / "tasks" / "_utils.py").write_text("")
    return tmp_path


@pytest.fixture
def stages(folder):
    plan = planned(folder / "tiny.yaml", models=["alpha"])[1]
    return {stage.kind: stage for stage in reversed(plan.stages.values())}


def user_files(stage, hashes=None):
    return UserFiles(stage.inputs.values(), lambda: FileHashes(hashes))


def test_every_file_of_the_users_is_known_by_its_content(stages):
    for kind in READS:
        own = {role: source.content for role, source in stages[kind].inputs.items() if not source.is_stage}
        assert all(own.values()), (kind, own)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in READS.items() for name in names])
def test_a_change_is_refused_and_named(folder, stages, kind, name):
    files = user_files(stages[kind])
    files.require_planned()
    files.require_untouched()
    with (folder / name).open("a") as stream:
        stream.write(" ")
    with pytest.raises(UserError, match=name.rpartition("/")[2].replace(".", r"\.")) as refusal:
        user_files(stages[kind]).require_planned()
    assert PLANNED in str(refusal.value) or name.endswith(".safetensors")
    with pytest.raises(UserError, match=name.rpartition("/")[2].replace(".", r"\.")):
        files.require_untouched()


def test_weights_of_the_same_length_are_told_apart(folder, stages):
    file = folder / "alpha" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ChangedInputError, match=rf"alpha \(most recently model\.safetensors\): changed {PLANNED}"):
        user_files(stages["importance"]).require_planned()


@pytest.mark.parametrize("name", ["alpha/chat_template.jinja", "tasks/_more.yaml", "tasks/sub/more.yaml"])
def test_a_file_that_was_added_or_removed_is_a_change(folder, name):
    def evaluation():
        return {s.kind: s for s in planned(folder / "tiny.yaml", models=["alpha"])[1].stages.values()}["evaluate"]

    before = evaluation()
    files = user_files(before)
    files.require_planned()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    for check in (user_files(before).require_planned, files.require_untouched):
        with pytest.raises(ChangedInputError, match=(folder / name).name):
            check()
    with_it = user_files(evaluation())
    with_it.require_planned()
    (folder / name).unlink()
    for check in (user_files(evaluation()).require_planned, user_files(before).require_planned):
        check()
    with pytest.raises(ChangedInputError):
        with_it.require_untouched()


def replace_by_the_same(file):
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)


@pytest.mark.parametrize(
    ("touch", "refused"),
    [
        (replace_by_the_same, True),  # something else may have stood there for a moment
        (lambda file: file.write_bytes(file.read_bytes()), True),
        (lambda file: file.chmod(0o640), False),
        (lambda file: os.link(file, file.with_name(".another-name")), False),
    ],
)
def test_while_a_stage_reads_a_file_nobody_may_write_it(folder, stages, touch, refused):
    files = user_files(stages["importance"])
    files.require_planned()
    touch(folder / "calibration.jsonl")
    if refused:
        with pytest.raises(ChangedInputError, match=r"calibration\.jsonl: written or replaced while a stage read it"):
            files.require_untouched()
    else:
        files.require_untouched()
    user_files(stages["importance"]).require_planned()


def test_a_change_under_the_old_times_is_found(folder, stages):
    files, file = user_files(stages["importance"]), folder / "calibration.jsonl"
    files.require_planned()
    stat = file.stat()
    content = file.read_text()
    file.write_text(content.swapcase())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ChangedInputError, match=r"calibration\.jsonl: changed while a stage read it"):
        files.require_untouched()


def test_what_was_read_before_is_not_read_again(folder, stages, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "STABLE_NS", 0)
    time.sleep(0.02)
    reads, compute = [], FileHashes._compute
    monkeypatch.setattr(FileHashes, "_compute", lambda self, *rest: reads.append(rest[0].name) or compute(self, *rest))
    user_files(stages["importance"], tmp_path / "hashes").require_planned()
    assert sorted(reads)[-2:] == ["tokenizer.json", "tokenizer_config.json"] and reads.count("model.safetensors") == 1
    reads.clear()
    again = user_files(stages["recover"], tmp_path / "hashes")
    again.require_planned()
    again.require_untouched()
    assert reads == ["pairs.jsonl"]


def test_a_commit_of_the_hub_only_has_to_be_there(folder, stages):
    """Its files are named after their content, and never change."""
    pinned = stage_of("importance", "a", {}, {"model": Input("digest", str(folder / "alpha"), content="commit")})
    files = user_files(pinned)
    (folder / "alpha" / "generation_config.json").write_text("{}")
    files.require_planned()
    files.require_untouched()
    (folder / "alpha" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"alpha.*safetensors"):
        user_files(pinned).require_planned()


def test_the_content_of_an_input_leaves_fingerprints_alone():
    stages = [
        stage_of("prune", "", {}, {"model": Input("id", "/x", content=content)}) for content in ("", "file", "commit")
    ]
    assert len({stage.id for stage in stages}) == 1


def test_a_file_that_vanishes_while_the_newest_is_looked_for_is_the_newest(tmp_path, monkeypatch):
    (tmp_path / "old.yaml").write_text("")
    monkeypatch.setattr("hfprune_dist.planning.user_files.files_below", lambda _: ["old.yaml", "gone.yaml"])
    named = _changed_part(Input("digest", str(tmp_path), content="folder"))
    assert named == f"{tmp_path} (most recently gone.yaml)"


# Files outside the folder of tasks that these read.

OUTSIDE = ["data/more.jsonl", "data/base.yml"]


def evaluation_in(folder):
    return {it.kind: it for it in planned(folder / "tiny.yaml", models=["alpha"])[1].stages.values()}["evaluate"]


@pytest.fixture
def reading_elsewhere(folder):
    (folder / "data").mkdir()
    (folder / "data" / "more.jsonl").write_text("{}\n")
    (folder / "data" / "base.yml").write_text("output_type: multiple_choice\n")
    (folder / "tasks" / "more.yaml").write_text(
        "task: more\ninclude: ../data/base.yml\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: ../data/more.jsonl}}\n"
    )
    return folder


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_tasks_read_elsewhere_is_part_of_the_fingerprint(reading_elsewhere, name):
    before, file = evaluation_in(reading_elsewhere), reading_elsewhere / name
    content = file.read_text()
    assert evaluation_in(reading_elsewhere).id == before.id
    file.write_text(content + " \n")
    assert evaluation_in(reading_elsewhere).id != before.id
    file.write_text(content)
    assert evaluation_in(reading_elsewhere).id == before.id
    file.unlink()
    assert evaluation_in(reading_elsewhere).id != before.id


def test_another_place_is_no_change(reading_elsewhere, tmp_path_factory):
    before, elsewhere = evaluation_in(reading_elsewhere), tmp_path_factory.mktemp("moved") / "all"
    reading_elsewhere.rename(elsewhere)
    task = elsewhere / "tasks" / "choice.yaml"
    assert str(reading_elsewhere) in task.read_text(), "its own data is named in full, and so is not the same any more"
    after = evaluation_in(elsewhere)
    assert after.inputs["files of tasks"].identity == before.inputs["files of tasks"].identity


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("change", ["write", "remove"])
def test_a_change_elsewhere_is_refused_and_named(reading_elsewhere, name, change):
    stage, file = evaluation_in(reading_elsewhere), reading_elsewhere / name
    files = user_files(stage)
    files.require_planned()
    files.require_untouched()
    if change == "write":
        file.write_text(file.read_text() + " ")
    else:
        file.unlink()
    named = file.name.replace(".", r"\.") if change == "write" else "tasks|data"
    with pytest.raises(ChangedInputError, match=rf"({named}).*: changed {PLANNED}"):
        user_files(stage).require_planned()
    with pytest.raises(ChangedInputError, match=file.name.replace(".", r"\.")):
        files.require_untouched()


def test_files_elsewhere_that_change_places_are_a_change(reading_elsewhere):
    data, task = reading_elsewhere / "data", reading_elsewhere / "tasks" / "more.yaml"
    (data / "other").mkdir()
    (data / "other" / "more.jsonl").write_text('{"q": 1}\n')
    task.write_text(task.read_text().replace("more.jsonl}", "more.jsonl, train: ../data/other/more.jsonl}"))
    before = evaluation_in(reading_elsewhere)
    (data / "other" / "more.jsonl").rename(data / "kept")
    (data / "more.jsonl").rename(data / "other" / "more.jsonl")
    (data / "kept").rename(data / "more.jsonl")
    assert evaluation_in(reading_elsewhere).id != before.id

"""The beginning and end of a stage, whatever has happened to its inputs and its claim meanwhile."""

import shutil
import time
from dataclasses import replace
from importlib.metadata import version

import pytest
from damage import behind
from made_stages import begun, being_made, stage_of
from ranks import SoloWorld

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.data.text import identity_of
from hfprune_dist.errors import LostInputError, UserError
from hfprune_dist.planning.user_files import ChangedInputError
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import End
from hfprune_dist.store.claims import try_claim
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

NEED = stage_of("importance", "a", {}, {"model": Input("digest", "/somewhere")})


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("planned")
    return file


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    with being_made(store, NEED) as draft:
        (draft / "scores").write_text("scores")
    return store


def begin(store, text, claim=None):
    """Begin a stage that reads an artifact and a text, with progress and all that others leave in its work folder."""
    inputs = {
        "importance": NEED.as_input(),
        "text": Input(identity_of(text, FileHashes(None)), str(text), content="text"),
    }
    stage = stage_of("prune", "a", {}, inputs)
    context = Context(stage, store, SoloWorld(), RuntimeConfig(), Progress(None), {}, {}, 1, claim)
    context.work.mkdir(parents=True, exist_ok=True)
    for name in ("stage.json", "progress.json", "partial.safetensors"):
        (context.work / name).write_text("{}")
    (context.work / "snapshots").mkdir(exist_ok=True)
    (context.work / "snapshots" / "step-1").write_text("")
    return context


def claimed(store, text):
    context = begin(store, text)
    return begin(store, text, try_claim(context.work))


def progress_of(context):
    return sorted(path.name for path in context.work.iterdir() if path.name in ("partial.safetensors", "snapshots"))


def test_a_stage_on_the_planned_files_commits(store, text):
    context = claimed(store, text)
    context.check_inputs()
    assert progress_of(context) == ["partial.safetensors", "snapshots"]
    draft = context.open_draft()
    (draft / "weights").write_text("weights")
    context.commit(draft, {})
    assert store.handle(context.stage.id).verify().state == "done" and not context.work.exists()


def test_a_stage_in_an_environment_of_other_releases_is_refused(store, text):
    context = claimed(store, text)
    releases = {"torch": ".".join(version("torch").split(".")[:2]), "peft": "0.1"}
    context = replace(context, stage=replace(context.stage, releases=releases))
    with pytest.raises(UserError, match=r"planned with peft 0\.1, but \S+ has peft 0\.\d+: use one environment"):
        context.check_inputs()


def test_a_file_that_changed_after_planning_is_refused_and_so_is_what_was_made_of_it(store, text):
    context = claimed(store, text)
    text.write_text("Planned")
    with pytest.raises(
        ChangedInputError, match=r"text\.jsonl: changed since the sweep was planned; run the sweep again"
    ):
        context.check_inputs()
    assert progress_of(context) == []
    assert {"claim.1", "stage.json", "progress.json"} <= {path.name for path in context.work.iterdir()}


def test_nothing_is_committed_that_may_have_been_made_of_another_file(store, text):
    context = claimed(store, text)
    context.check_inputs()
    text.write_text("another")
    draft = context.open_draft()
    (draft / "weights").write_text("poisoned")
    with pytest.raises(ChangedInputError, match=r"text\.jsonl.*: changed while a stage read it"):
        context.commit(draft, {})
    assert store.handle(context.stage.id).verify().state == "missing" and progress_of(context) == []
    text.write_text("planned")
    claimed(store, text).check_inputs()


def test_nothing_is_committed_that_may_have_been_made_of_a_damaged_artifact(store, text):
    context = claimed(store, text)
    context.check_inputs()
    draft = context.open_draft()
    (store.handle(NEED.id).artifact / "scores").write_text("scorez")
    with pytest.raises(LostInputError, match="scores: content changed"):
        context.commit(draft, {})
    assert store.handle(context.stage.id).verify().state == "missing" and progress_of(context) == []
    context.commit(draft, {})  # one that is gone has been read, or its reader would have failed


def test_progress_made_with_an_artifact_is_kept_while_that_has_the_same_content(store, text):
    context, handle = claimed(store, text), store.handle(NEED.id)
    kept = {}
    for content in ("scores", "scores", "others", "others"):
        shutil.rmtree(handle.artifact)
        with being_made(store, NEED) as draft:
            (draft / "scores").write_text(content)
        context.check_inputs()
        kept[content, len(kept)] = progress_of(context) != []
        begin(store, text)
    assert [*kept.values()] == [True, True, False, True]


def test_damage_is_set_aside(store, text):
    (store.handle(NEED.id).artifact / "scores").write_text("scorez")
    with pytest.raises(
        LostInputError, match=rf"{NEED.id}: scores: content changed.*; run the sweep again to make it anew"
    ):
        begin(store, text).check_inputs()
    assert store.handle(NEED.id).verify().state == "missing"
    with pytest.raises(LostInputError, match=rf"{NEED.id}: not made yet; run the sweep again"):
        begin(store, text).check_inputs()


def test_what_looks_as_committed_is_read_only_after_a_failed_attempt(store, text):
    file = store.handle(NEED.id).artifact / "scores"
    with behind(file):
        file.write_text(file.read_text()[::-1])
    context = begin(store, text)
    context.check_inputs()
    for cause in ("interrupted", "killed"):
        context.check_inputs()
        begun(store, context.stage).close(End(cause, "", 1.0))
    with pytest.raises(LostInputError, match="scores: content changed"):
        context.check_inputs()


def test_a_clock_that_is_set_lengthens_no_stage(store, text, monkeypatch):
    context, wrong = claimed(store, text), time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: wrong)
    draft = context.open_draft()
    (draft / "model.bin").write_text("weights")
    context.commit(draft, {}, 1000.0)  # of earlier attempts
    manifest = store.handle(context.stage.id).manifest()
    assert 0 <= manifest["wall_time_s"] - 1000 < 600
    assert manifest["finished"] - manifest["started"] == pytest.approx(manifest["wall_time_s"] - 1000, abs=1e-3)


def test_what_depends_on_the_same_is_computed_once_for_all_stages(store, text):
    def refuse():
        raise UserError("not such a model")

    context = begin(store, text)
    context.stage.inputs["model"] = NEED.inputs["model"]
    with pytest.raises(UserError):
        context.once("order", [1], refuse)
    assert [context.once("order", [1], lambda: [0.1, 2]), context.once("order", [1], refuse)] == [[0.1, 2]] * 2
    assert context.once("order", [2], lambda: None) is None
    for file in (store.root / "layers").iterdir():
        file.write_text("{")
    assert context.once("order", [1], lambda: 3) == 3


def test_what_was_computed_of_an_artifact_is_not_that_of_one_made_again_with_other_content(store, text):
    context = begin(store, text)
    context.stage.inputs["model"] = NEED.as_input()
    assert [context.once("order", [1], lambda: 1), context.once("order", [1], lambda: 2)] == [1, 1]
    shutil.rmtree(store.handle(NEED.id).artifact)
    with being_made(store, NEED) as draft:
        (draft / "scores").write_text("others")
    assert context.once("order", [1], lambda: 2) == 2

"""The recover stage, run in its own ranks: what it writes, and that neither a kill nor the world size changes it."""

import json
import shutil

import pytest
import torch
from made_stages import being_made, stage_of
from peft import PeftModel
from ranks import SoloWorld, finish, killing, metrics_of, run_stage
from tiny import save_tiny, write_pairs
from tracked import require_reported
from trained import assert_same_weights, lines_of, losses_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.data.instructions import save_rows
from hfprune_dist.errors import UserError
from hfprune_dist.stages import training
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

STEPS = 6
RECOVERY = {"sequence_length": 256, "batch_size": 2, "max_steps": STEPS, "learning_rate": 1e-2}
RECOVERY |= {"rank": 4, "alpha": 8, "dropout": 0.1}
RUNTIME = {"sharding": "replicate", "save_every_steps": 2, "collective_timeout_minutes": 1}


def make_stage(source, **changes):
    files = {"model": source / "model", "text": source / "pairs.jsonl"}
    inputs = {role: Input(role, str(file)) for role, file in files.items()}
    return stage_of("recover", "tiny", {"recovery": RECOVERY | changes}, inputs)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "model", shard_size="60KB", dtype=torch.bfloat16)
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, source):
    """The stage, run on two ranks, in bfloat16 and with dropout; each has whole weights."""
    store, stage = Store(tmp_path_factory.mktemp("uninterrupted") / "store"), make_stage(source)
    finish(store, stage, 2, **RUNTIME)
    return store, stage


@pytest.mark.slow
def test_the_artifact_is_a_plain_checkpoint_and_computes_what_its_adapter_does(uninterrupted, source):
    store, stage = uninterrupted
    before, after = open_checkpoint(source / "model"), open_checkpoint(store.handle(stage.id).artifact)
    assert after.tensors == before.tensors
    assert sorted(file.name for file in after.path.glob("*.safetensors")) == before.weight_files
    assert AutoModelForCausalLM.from_pretrained(after.path, dtype="auto").dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(after.path)) == len(AutoTokenizer.from_pretrained(before.path))
    assert str(source) not in (after.path / "adapter" / "adapter_config.json").read_text()
    dense, merged = (
        AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32) for checkpoint in (before, after)
    )
    input_ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        change = (dense(input_ids).logits - merged(input_ids).logits).norm()
        adapted = PeftModel.from_pretrained(dense, after.path / "adapter").eval()
        rounding = (adapted(input_ids).logits - merged(input_ids).logits).norm()
    assert rounding < 0.05 * change


@pytest.mark.slow
def test_losses_fall_and_reach_the_manifest(uninterrupted):
    store, stage = uninterrupted
    lines = lines_of(store, stage)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0].keys() == {"step", "epoch", "loss", "learning_rate", "grad_norm"}
    assert lines[0]["learning_rate"] == RECOVERY["learning_rate"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    metrics = metrics_of(store, stage)
    assert (metrics["pairs"], metrics["dropped_pairs"], metrics["steps"]) == (40, 0, STEPS)
    assert (metrics["first_loss"], metrics["final_loss"]) == (lines[0]["loss"], lines[-1]["loss"])
    assert 0 < metrics["trained_tokens"] < metrics["tokens"] <= metrics["rows"] * RECOVERY["sequence_length"]


@pytest.mark.slow
def test_a_killed_stage_goes_on_to_the_same_bits_and_on_another_world_size_close_to_them(
    tmp_path, source, uninterrupted
):
    """Unlike the run that was not killed, this one has a tracker: it is told each step, and changes no bit."""
    store, stage = Store(tmp_path / "two" / "store"), make_stage(source)
    tracked = {"report_to": ["tensorboard"]}
    assert run_stage(store, stage, 2, environment=killing(0, 4, "/snapshot."), **RUNTIME, **tracked).returncode != 0
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    alone = Store(tmp_path / "one" / "store")

    assert "step 1/" not in finish(store, stage, 2, **RUNTIME, **tracked)
    name = require_reported(tmp_path / "two" / "tracking", lines_of(store, stage))
    assert name.startswith("tiny-recover-") and not (uninterrupted[0].root.parent / "tracking").exists()
    expected = losses_of(*uninterrupted)
    assert losses_of(store, stage) == expected
    assert_same_weights(store.handle(stage.id).artifact, uninterrupted[0].handle(stage.id).artifact)

    assert "step 1/" not in finish(alone, stage, **RUNTIME)
    assert losses_of(alone, stage) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_snapshot_of_other_answers_is_left(tmp_path, source):
    """Answers that are lost are made again, on GPUs with other bits, and may fill fewer rows."""
    store, answers = Store(tmp_path / "store"), stage_of("answers", "tiny", {}, {"model": Input("m", "/m")})
    inputs = {"model": make_stage(source).inputs["model"], "answers": answers.as_input()}
    stage = stage_of("recover", "tiny", {"recovery": RECOVERY | {"max_steps": None, "epochs": 1.0}}, inputs)

    def make_answers(count):
        records = ({"prompt_ids": [1, 3 + number], "response_ids": [5] * 200} for number in range(count))
        with being_made(store, answers) as draft:
            (draft / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    make_answers(16)
    assert run_stage(store, stage, 1, environment=killing(0, 4, "/snapshot."), **RUNTIME).returncode != 0
    assert list(store.handle(stage.id).work.glob("snapshot.safetensors"))
    shutil.rmtree(store.handle(answers.id).artifact)
    make_answers(2)
    assert "step 1/1," in finish(store, stage, **RUNTIME)
    assert metrics_of(store, stage)["steps"] == 1


@pytest.mark.slow
def test_diverged_training_is_the_users_to_mend(tmp_path, source):
    store, stage = Store(tmp_path), make_stage(source, learning_rate=1e30)
    code, output = run_stage(store, stage, **RUNTIME)
    assert code == UserError.EXIT_CODE and "at step 2; lower recovery.learning_rate" in output
    assert not store.handle(stage.id).artifact.exists()


def prepare_rows(store, stage):
    store.handle(stage.id).work.mkdir(parents=True, exist_ok=True)
    context = Context(stage, store, SoloWorld(), RuntimeConfig(), Progress(None), {}, {}, 1)
    return training.prepare_rows(context, open_checkpoint(context.input_path("model")))


def test_stages_of_a_store_share_rows_of_the_same_pairs_length_and_tokenizer(tmp_path, source, monkeypatch):
    made, store = [], Store(tmp_path / "store")
    monkeypatch.setattr(training, "save_rows", lambda *those, **how: made.append(1) or save_rows(*those, **how))
    first = prepare_rows(store, make_stage(source))
    assert prepare_rows(store, make_stage(source, rank=2, max_steps=3)) == first and len(made) == 1
    swapped = {"instruction_field": "response", "response_field": "instruction"}
    changed = [{"sequence_length": 300}, {"samples": 2}, swapped]
    files = {prepare_rows(store, make_stage(source, **changes)) for changes in changed}
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source" / "model" / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    files.add(prepare_rows(store, make_stage(tmp_path / "source")))
    (tmp_path / "source" / "model" / "chat_template.jinja").write_text("{{ messages }}")
    files.add(prepare_rows(store, make_stage(tmp_path / "source")))
    assert len(files - {first}) == 5 and len(made) == 6

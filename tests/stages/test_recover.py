"""The recover stage, run in its own ranks: what it writes, and that neither a kill nor the world size changes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from damage import DAMAGES, damage
from hypothesis import given, settings
from made_stages import stage_of
from peft import PeftModel
from ranks import SoloWorld, killing, run_ranks
from safetensors.torch import load_file
from tiny import save_tiny, write_pairs
from tracked import require_reported
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import RuntimeConfig, Tracker
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.data.instructions import RowCounts, save_rows
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.stages import instruction_tuning
from hfprune_dist.stages.context import Context
from hfprune_dist.store import file_cache as cache
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input, Stage
from hfprune_dist.training.snapshots import Snapshot, Snapshots, read_snapshot

STEPS = 12
RECOVERY = {
    "sequence_length": 512,
    "batch_size": 4,
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "rank": 4,
    "alpha": 8,
    "dropout": 0.1,
}


@dataclass(frozen=True)
class Run:
    """A recover stage laid out in a store."""

    store: Store
    stage: Stage

    @property
    def artifact(self) -> Path:
        return self.store.path(self.stage.id)

    @property
    def snapshots(self) -> Path:
        return self.store.work(self.stage.id) / "snapshots"

    def lines(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in (self.artifact / "loss.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines()]

    def weights(self) -> dict[str, torch.Tensor]:
        checkpoint = open_checkpoint(self.artifact)
        return {
            name: tensor for file in checkpoint.weight_files for name, tensor in load_file(self.artifact / file).items()
        }


def write_stage_file(
    root: Path, source: Path, *, sharding: str = "replicate", report_to: Sequence[Tracker] = (), **changes: object
) -> Run:
    recovery = RecoveryConfig(**{**RECOVERY, **changes}).model_dump(
        exclude={"path", "dataset", "name", "split", "revision"}
    )
    inputs = {
        "model": Input("model", str(source / "model")),
        "instructions": Input("pairs", str(source / "pairs.jsonl")),
    }
    stage = stage_of("recover", "tiny", {"recovery": recovery, "seed": 0}, inputs)
    work = Store(root).work(stage.id)
    work.mkdir(parents=True, exist_ok=True)
    settings = {"sharding": sharding, "save_every_steps": 3, "collective_timeout_minutes": 1}
    runtime = RuntimeConfig(**settings, report_to=list(report_to)).model_dump()
    record = {"stage": stage.to_json(), "runtime": runtime, "config": {}, "code": {}, "attempt": 1}
    (work / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    return Run(Store(root), stage)


def finish(run: Run, ranks: int, code: int = 0) -> str:
    ended = run_ranks(run.store, run.stage, ranks)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def kill_after_first_snapshot(run: Run) -> None:
    killed = run_ranks(run.store, run.stage, 2, environment=killing(0, 6, "/snapshots"))
    assert killed.returncode != 0 and not run.artifact.exists()
    assert len(list(run.snapshots.glob("step-*"))) == 1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "model", shard_size="60KB", dtype=torch.bfloat16)
    write_pairs(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, source):
    """The stage, run on two ranks, in bfloat16 and with dropout; each has whole weights."""
    run = write_stage_file(tmp_path_factory.mktemp("uninterrupted") / "store", source)
    finish(run, ranks=2)
    return run


@pytest.mark.slow
def test_artifact_is_a_plain_checkpoint(uninterrupted, source):
    before, after = open_checkpoint(source / "model"), open_checkpoint(uninterrupted.artifact)
    assert after.tensors == before.tensors
    assert sorted(file.name for file in after.path.glob("*.safetensors")) == before.weight_files
    model = AutoModelForCausalLM.from_pretrained(after.path, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(after.path)) == len(AutoTokenizer.from_pretrained(before.path))
    assert str(source) not in (after.path / "adapter" / "adapter_config.json").read_text()


@pytest.mark.slow
def test_adapter_on_the_source_computes_what_the_artifact_computes(uninterrupted, source):
    dense = AutoModelForCausalLM.from_pretrained(source / "model", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(uninterrupted.artifact, dtype=torch.float32)
    input_ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        change = (dense(input_ids).logits - merged(input_ids).logits).norm()
        adapted = PeftModel.from_pretrained(dense, uninterrupted.artifact / "adapter").eval()
        rounding = (adapted(input_ids).logits - merged(input_ids).logits).norm()
    assert rounding < 0.05 * change


@pytest.mark.slow
def test_losses_fall_and_reach_the_manifest(uninterrupted):
    lines = uninterrupted.lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0].keys() == {"step", "epoch", "loss", "learning_rate", "grad_norm"}
    assert lines[0]["learning_rate"] == RECOVERY["learning_rate"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    metrics = uninterrupted.store.manifest(uninterrupted.stage.id)["metrics"]
    assert metrics["pairs"] == 40
    assert metrics["rows"] < metrics["pairs"]
    assert metrics["dropped_pairs"] == 0
    assert metrics["steps"] == STEPS
    assert (metrics["first_loss"], metrics["final_loss"]) == (lines[0]["loss"], lines[-1]["loss"])
    assert 0 < metrics["trained_tokens"] < metrics["tokens"] <= metrics["rows"] * RECOVERY["sequence_length"]


@pytest.mark.slow
def test_killed_stage_goes_on_to_the_same_bits_and_on_another_world_size_close_to_them(tmp_path, source, uninterrupted):
    """Unlike the run that was not killed, this one has a tracker: it is told each step, and changes no bit."""
    killed = write_stage_file(tmp_path / "two" / "store", source, report_to=["tensorboard"])
    kill_after_first_snapshot(killed)
    (killed.snapshots / "step-99999999.safetensors").write_bytes(b"cut short")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    alone = Run(Store(tmp_path / "one" / "store"), killed.stage)

    assert "step 1/" not in finish(killed, ranks=2)
    assert killed.losses() == uninterrupted.losses()
    name = require_reported(tmp_path / "two" / "tracking", killed.lines())
    assert name.startswith("tiny-recover-") and not (uninterrupted.store.root.parent / "tracking").exists()
    for name, tensor in killed.weights().items():
        assert torch.equal(tensor, uninterrupted.weights()[name]), name

    assert "step 1/" not in finish(alone, ranks=1)
    assert alone.losses() == pytest.approx(uninterrupted.losses(), rel=1e-3)
    expected, actual = (
        load_file(run.artifact / "adapter" / "adapter_model.safetensors") for run in (uninterrupted, alone)
    )
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.05, atol=2e-3)


@pytest.mark.slow
def test_diverged_training_is_the_users_to_mend(tmp_path, source):
    run = write_stage_file(tmp_path, source, learning_rate=1e30)
    output = finish(run, ranks=1, code=UserError.EXIT_CODE)
    assert "at step 2; lower recovery.learning_rate" in output
    assert not run.artifact.exists()


def prepare_rows(run: Run, world: World | None = None) -> RowCounts:
    context = Context(
        stage=run.stage,
        store=run.store,
        world=world or SoloWorld(),
        runtime=RuntimeConfig(),
        progress=Progress(None),
        config={},
        code={},
        attempt=1,
    )
    checkpoint = open_checkpoint(context.input_path("model"))
    return instruction_tuning.prepare_rows(context, run.stage.params.recovery, checkpoint)


def test_stages_that_differ_in_training_alone_share_their_rows(tmp_path, source, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("pairs are tokenized again")

    counts = prepare_rows(write_stage_file(tmp_path, source))
    monkeypatch.setattr(instruction_tuning, "_Collector", refuse)
    assert prepare_rows(write_stage_file(tmp_path, source, rank=2, max_steps=3)) == counts
    for changes in ({"sequence_length": 256}, {"samples": 2}, {"response_field": "instruction"}):
        with pytest.raises(AssertionError, match="tokenized again"):
            prepare_rows(write_stage_file(tmp_path, source, **changes))


def test_another_tokenizer_makes_its_own_rows(tmp_path, source, monkeypatch):
    prepare_rows(write_stage_file(tmp_path / "store", source))
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source" / "model" / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    made = []
    monkeypatch.setattr(
        instruction_tuning,
        "save_rows",
        lambda *arguments, **options: made.append(1) or save_rows(*arguments, **options),
    )
    shutil.rmtree(Store(tmp_path / "store").root / "work")
    prepare_rows(write_stage_file(tmp_path / "store", tmp_path / "source"))
    assert made


@pytest.mark.parametrize(
    ("batch_size", "rows", "ranks", "told"),
    [
        (12, 2, 4, "set batch_size to 8 or 16, or micro_batch_size to 1, or the ranks to one of 1, 2, 3, 6"),
        (32, 8, 8, "set batch_size to 64, or micro_batch_size to 4, or the ranks to one of 1, 2, 4"),
        (3, 4, 2, "set batch_size to 8"),
    ],
)
def test_batch_size_that_ranks_cannot_share_names_those_that_work(batch_size, rows, ranks, told):
    RecoveryConfig(batch_size=12, micro_batch_size=2).require_shared_evenly(3)
    with pytest.raises(UserError, match=rf"; {told}$"):
        RecoveryConfig(batch_size=batch_size, micro_batch_size=rows).require_shared_evenly(ranks)


def test_two_newest_snapshots_stay_and_a_damaged_one_is_passed_over(tmp_path):
    snapshots = Snapshots(tmp_path)
    assert snapshots.newest() is None
    for step in (3, 6, 9):
        weights, moments = {"a": torch.full((2,), step)}, {"a.exp_avg": torch.ones(2), "a.exp_avg_sq": torch.zeros(2)}
        snapshots.save(Snapshot(step, weights, moments, [{"step": step, "loss": 1.0}]))
    newest = snapshots.newest()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "step-00000006.safetensors",
        "step-00000009.safetensors",
    ]
    assert read_snapshot(newest).weights.keys() == {"a"}
    assert read_snapshot(newest).losses == [{"step": 9, "loss": 1.0}]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert read_snapshot(snapshots.newest()).step == 6


@settings(max_examples=60, deadline=None, derandomize=True)
@given(how=DAMAGES)
def test_a_damaged_snapshot_is_set_aside_and_the_one_before_it_taken(tmp_path_factory, how):
    snapshots = Snapshots(tmp_path_factory.mktemp("snapshots"))
    for step in (3, 6):
        moments = {"a.exp_avg": torch.rand(5), "a.exp_avg_sq": torch.rand(5)}
        snapshots.save(Snapshot(step, {"a": torch.rand(5)}, moments, [{"step": step, "loss": 1.0}]))
    newest = snapshots.newest()
    if damage(newest, *how):
        assert read_snapshot(snapshots.newest()).step == 3
        assert not newest.exists() and newest.with_name(f"{newest.name}.damaged-1").is_file()


@pytest.mark.parametrize("how", [(0.0, "nothing"), (0.3, "nothing"), (0.9, "zeros"), (0.9, "garbage")])
@pytest.mark.parametrize("links", [True, False], ids=["linked to the cache", "alone"])
def test_damaged_rows_are_made_again(tmp_path, source, monkeypatch, capsys, links, how):
    if not links:
        monkeypatch.setattr(cache, "_link", refuse_link)
    run = write_stage_file(tmp_path, source)
    counts = prepare_rows(run)
    file = run.store.work(run.stage.id) / instruction_tuning.ROWS
    content = file.read_bytes()
    damage(file, *how)
    assert prepare_rows(run) == counts and file.read_bytes() == content
    assert "set aside" in capsys.readouterr().out
    assert prepare_rows(run) == counts and "set aside" not in capsys.readouterr().out


def refuse_link(*_: object) -> None:
    raise OSError("no hard links here")

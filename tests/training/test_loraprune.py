"""Units that are scored and masked while LoRA trains, on real ranks: against autograd, and after a kill."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fine_tunings import make_task, train
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import kept_of, models, write
from peft import LoraConfig, get_peft_model
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.kinds.memory import Placement
from hfprune_dist.methods.loraprune import DECAY, gone_after
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Block, neurons
from hfprune_dist.training import snapshots, trainer
from hfprune_dist.training.engine_setup import MAX_GRAD_NORM
from hfprune_dist.training.loraprune import UnitMasks
from hfprune_dist.training.snapshots import read_snapshot

STEPS = 4
SMALL = {"num_hidden_layers": 3, "intermediate_size": 12}
# Every matrix has more elements than DeepSpeed leaves unsharded.
WIDE = {"hidden_size": 320, "intermediate_size": 416, "num_key_value_heads": 4, "head_dim": 80}


def masking_task(checkpoint, **settings):
    """The middle layer loses 5 neurons and a KV group, the last one 2 neurons."""
    width, groups = checkpoint.units.most, checkpoint.structures["kv_groups"].most
    shape = Shape((0, 1, 2), {"neurons": (width, width - 5, width - 2), "kv_groups": (groups, groups - 1, groups)})
    task = make_task(checkpoint, **{"dropout": 0.0, "dtype": "float32", "learning_rate": 1e-2, **settings})
    return replace(task, total_steps=STEPS, save_every_steps=1, masked_to=shape)


def masks_of(task, snapshot):
    return UnitMasks(task.checkpoint.structures, task.masked_to, snapshot.units)


def expected_scores(task, snapshot, step):
    """Return the scores of the step after a snapshot, by autograd in one process, computed as in the paper's code."""
    settings, family = task.settings, task.checkpoint.family
    model = AutoModelForCausalLM.from_pretrained(task.checkpoint.path, dtype=torch.float64)
    adapter = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=lora_targets(family))
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False).double()
    model.load_state_dict({name: it.double() for name, it in snapshot.weights.items()}, strict=False)
    masks = masks_of(task, snapshot)
    masks.attach(model.get_base_model(), torch.device("cpu"), torch.float64)
    rows = [task.rows(row) for row in task.schedule.rows_of(step)]
    model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]}).loss.backward()
    grads = [it.grad for it in model.parameters() if it.requires_grad]
    share = min(1.0, MAX_GRAD_NORM / float(torch.cat([it.flatten() for it in grads]).norm()))
    found = {}
    for layer, kinds in masks.kinds_by_layer.items():
        for units in kinds:
            total = 0
            for owned in units.owned:
                if owned.tensor.endswith("weight"):
                    module = model.get_base_model().get_submodule(units.tensor(layer, owned.tensor)[:-7])
                    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                    g_a, g_b = share * a.grad, share * b.grad
                    terms = (g_b @ a + b @ g_a - g_b @ g_a) * (module.base_layer.weight + 2 * b @ a)
                    terms = terms if owned.axis == 0 else terms.T
                    sums = terms.abs().reshape(units.counts[layer], -1).sum(1)
                    total = total + sums / sums.norm()
            found[units.kind, layer] = total.detach()
    return found


@pytest.mark.parametrize(
    ("variant", "ranks", "whole"),
    [("llama-tied-biases", 1, True), ("qwen2", 2, True), ("qwen3", 2, False), ("mistral", 1, False)],
)
def test_averages_are_those_of_the_whole_batch(monkeypatch, tmp_path, variant, ranks, whole):
    monkeypatch.setattr(trainer, "place_training", lambda *_: Placement(whole, False, fits=True))
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", variant, **SMALL))
    task = masking_task(checkpoint, micro_batch_size=2)
    last, _ = train(tmp_path / "run", ranks, task)
    before = read_snapshot(tmp_path / "run" / "snapshots" / f"step-{STEPS - 1:08d}.safetensors")
    scores = expected_scores(task, before, STEPS - 1)
    assert len(scores) == 3
    for (kind, layer), scores_U in scores.items():
        name = f"units.{kind}.{layer}.average"
        expected = DECAY * before.units[name] + (1 - DECAY) * scores_U
        torch.testing.assert_close(last.units[name], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_any_snapshot_leads_to_the_same_bits(monkeypatch, tmp_path):
    """From the first and the last but one; sharded weights and other numbers of ranks come close."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", "qwen3", num_hidden_layers=3, **WIDE))
    task = masking_task(checkpoint, dropout=0.1)
    monkeypatch.setattr(snapshots, "KEPT_SNAPSHOTS", STEPS)
    found = {}
    for name, whole in (("sharded", False), ("whole", True)):
        monkeypatch.setattr(trainer, "place_training", lambda *_, whole=whole: Placement(whole, False, fits=True))
        found[name], _ = train(tmp_path / name, 2, task)
    for snapshot in sorted((tmp_path / "whole" / "snapshots").glob("step-*"))[:-1:2]:
        (tmp_path / snapshot.stem / "snapshots").mkdir(parents=True)
        shutil.copy(snapshot, tmp_path / snapshot.stem / "snapshots")
        found[snapshot.stem], _ = train(tmp_path / snapshot.stem, 2, task)
    expected, sharded = found.pop("whole"), found.pop("sharded")
    for name, snapshot in found.items():
        for part in ("weights", "moments", "units"):
            for key, tensor in getattr(expected, part).items():
                assert torch.equal(tensor, getattr(snapshot, part)[key]), (name, key)
    assert masks_of(task, expected).kept().shape == task.masked_to

    monkeypatch.setattr(trainer, "place_training", lambda *_: Placement(True, False, fits=True))
    alone, _ = train(tmp_path / "alone", 1, task)
    for key, average in ((key, it) for key, it in expected.units.items() if key.endswith("average")):
        for other in (sharded, alone):
            torch.testing.assert_close(other.units[key], average, rtol=0.02, atol=1e-3)


def state_of(checkpoint, kept):
    """Return what a snapshot contains if these units stay."""
    state = {}
    for kind, rows in kept.units.items():
        for layer, row in enumerate(rows):
            stays = torch.zeros(checkpoint.structures[kind].counts[layer], dtype=torch.bool)
            stays[row] = True
            state[f"units.{kind}.{layer}.stays"] = stays
            state[f"units.{kind}.{layer}.average"] = torch.zeros(len(stays), dtype=torch.float64)
    return state


@settings(max_examples=25)
@given(st.data())
def test_a_masked_model_computes_what_the_cut_one_computes(data):
    model = data.draw(models())
    kept = data.draw(kept_of(model, uniform=False, layers=False))
    with tempfile.TemporaryDirectory() as name:
        checkpoint = open_checkpoint(save_tiny(Path(name) / "dense", **model))
        write(checkpoint, kept, Path(name) / "cut")
        masks = UnitMasks(checkpoint.structures, kept.shape, state_of(checkpoint, kept))
        masked = load_causal_lm(checkpoint.path, torch.float32)
        masks.attach(masked, torch.device("cpu"), torch.float32)
        input_ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            ours = masked(input_ids).logits
            expected = load_causal_lm(Path(name) / "cut", torch.float32)(input_ids).logits
    difference, largest = (ours - expected).abs().max(), expected.abs().max()
    assert difference < 1e-5 * largest, (difference, largest)
    assert all(map(torch.equal, masks.kept().units[kind], rows) for kind, rows in kept.units.items())


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), total=st.integers(1, 25), data=st.data())
def test_the_lowest_averages_go_and_none_comes_back(counts, total, data):
    width = 9
    config = {"intermediate_size": width, "num_hidden_layers": len(counts)}
    units = neurons(config, Block("model.layers", "mlp", "norm"), ("gate_proj", "up_proj"), "down_proj")
    structures, shape = {units.kind: units}, Shape(tuple(range(len(counts))), {units.kind: tuple(counts)})
    masks = UnitMasks(structures, shape)
    assert list(masks.kinds_by_layer) == [layer for layer, count in enumerate(counts) if count < width]
    before = masks.kept()
    resumed_at = data.draw(st.integers(1, total))
    for step in range(1, total + 1):
        if step == resumed_at:
            masks = UnitMasks(structures, shape, masks.state())
        for layer in masks.kinds_by_layer:
            scores = torch.tensor(data.draw(st.permutations(range(width))), dtype=torch.float64)
            masks.average(units.kind, layer, scores)
        averages = {name: tensor for name, tensor in masks.state().items() if name.endswith("average")}
        masks.mask(step, total)
        after = masks.kept()
        rows = zip(counts, before.units[units.kind], after.units[units.kind], strict=True)
        for layer, (count, was, stays) in enumerate(rows):
            gone = set(was.tolist()) - set(stays.tolist())
            assert set(stays.tolist()) <= set(was.tolist())
            assert width - len(stays) == gone_after(step, total, width - count)
            if gone:
                average = averages[f"units.neurons.{layer}.average"]
                assert average[list(gone)].max() <= average[stays].min()
        before = after
    assert before.shape == shape

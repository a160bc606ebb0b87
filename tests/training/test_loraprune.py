"""Units that are scored and masked while LoRA trains, on real ranks: against autograd."""

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
from hfprune_dist.methods.loraprune import DECAY, gone_after, masks_after
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Block, neurons
from hfprune_dist.training import trainer
from hfprune_dist.training.loraprune import UnitMasks
from hfprune_dist.training.snapshot import Snapshot

STEPS = 4
SMALL = {"num_hidden_layers": 3, "intermediate_size": 12}


def masking_task(checkpoint, **settings):
    """The middle layer loses 5 neurons and a KV group, the last one 2 neurons."""
    width, groups = checkpoint.units.most, checkpoint.structures["kv_groups"].most
    shape = Shape((0, 1, 2), {"neurons": (width, width - 5, width - 2), "kv_groups": (groups, groups - 1, groups)})
    task = make_task(checkpoint, **{"dropout": 0.0, "dtype": "float32", "learning_rate": 1e-2, **settings})
    return replace(task, total_steps=STEPS, masked_to=shape)


def masks_of(task, snapshot):
    return UnitMasks(task.checkpoint.structures, task.masked_to, snapshot.tensors)


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
    share = min(1.0, settings.max_grad_norm / float(torch.cat([it.flatten() for it in grads]).norm()))
    found = {}
    for (kind, layer), units in masks.places.items():
        total = 0
        for name, place, _ in units.owned:
            if name.endswith("weight"):
                module = model.get_base_model().get_submodule(units.tensor(layer, name)[:-7])
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                g_a, g_b = share * a.grad, share * b.grad
                terms = (g_b @ a + b @ g_a - g_b @ g_a) * (module.base_layer.weight + 2 * b @ a)
                terms = terms if place == 0 else terms.T
                sums = terms.abs().reshape(units.counts[layer], -1).sum(1)
                total = total + sums / sums.norm()
        found[kind, layer] = total.detach()
    return found


@pytest.mark.parametrize(("variant", "ranks", "whole"), [("llama-tied-biases", 2, True), ("qwen3", 2, False)])
def test_averages_are_those_of_the_whole_batch(monkeypatch, tmp_path, variant, ranks, whole):
    monkeypatch.setattr(trainer, "placement_here", lambda *_: Placement(whole, False, fits=True))
    save = Snapshot.save
    monkeypatch.setattr(
        Snapshot, "save", lambda self, file, *own: [save(self, it, *own) for it in (file, tmp_path / str(self.step))]
    )
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", variant, **SMALL))
    task = masking_task(checkpoint, micro_batch_size=2)
    last, _ = train(tmp_path / "run", ranks, task)
    assert masks_of(task, last).kept().shape == task.masked_to
    before = Snapshot.read(tmp_path / str(STEPS - 1))
    scores = expected_scores(task, before, STEPS - 1)
    assert len(scores) == 3
    for (kind, layer), scores_U in scores.items():
        name = f"units.{kind}.{layer}.average"
        expected = DECAY * before.tensors[name] + (1 - DECAY) * scores_U
        torch.testing.assert_close(last.tensors[name], expected, rtol=2e-4, atol=1e-6)


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


@settings(max_examples=8)
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
    masks = UnitMasks(structures, shape, {})
    assert list(masks.places) == [(units.kind, layer) for layer, count in enumerate(counts) if count < width]
    before = masks.kept()
    resumed_at = data.draw(st.integers(1, total))
    for step in range(1, total + 1):
        if step == resumed_at:
            masks = UnitMasks(structures, shape, masks.state())
        drawn = {place: data.draw(st.permutations(range(width))) for place in masks.places}
        scores = {place: torch.tensor(it, dtype=torch.float64) for place, it in drawn.items()}
        masks.update(scores, step, total)
        averages = {name: tensor for name, tensor in masks.state().items() if name.endswith("average")}
        after = masks.kept()
        rows = zip(counts, before.units[units.kind], after.units[units.kind], strict=True)
        for layer, (count, was, stays) in enumerate(rows):
            gone = set(was.tolist()) - set(stays.tolist())
            assert set(stays.tolist()) <= set(was.tolist())
            if masks_after(step, total):
                assert width - len(stays) == gone_after(step, total, width - count)
            if gone:
                average = averages[f"units.neurons.{layer}.average"]
                assert average[list(gone)].max() <= average[stays].min()
        before = after
    assert before.shape == shape

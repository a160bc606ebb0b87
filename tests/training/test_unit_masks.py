"""Units that are masked in a model: what it computes then, and which units they are."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import kept_of, models, write
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.lora_scores import gone_after
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.neurons import neurons
from hfprune_dist.structures.units import Block
from hfprune_dist.training.unit_masks import UnitMasks


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


@settings(max_examples=25, deadline=None)
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

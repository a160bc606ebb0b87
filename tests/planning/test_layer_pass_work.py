"""Operations of refits over tiny models of drawn sizes, as torch counts them."""

import shutil

import pytest
import torch
from counted_flops import counting
from families import EXPERTS, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import some_kept
from ranks import SoloWorld
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core import triangle
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.planning import layer_pass_footprint, layer_pass_work
from hfprune_dist.planning.layer_pass_work import (
    WindowCounts,
    dense_refit,
    forward_of_all,
    least_squares,
    residual_checks,
    sequential_refit,
)
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.refit import final_norm_refit, gauss_newton_ranks, norms_refit
from hfprune_dist.refit.dense_refit import DenseRefit
from hfprune_dist.refit.measurement import dense_outputs
from hfprune_dist.refit.norm_gradients import NormGradients
from hfprune_dist.refit.pruned_layers import PrunedLayers
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.structures.kept import Kept

SIZES = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([16, 32, 48]),
        "intermediate_size": st.integers(24, 80),
        "num_hidden_layers": st.integers(2, 3),
    }
)
WINDOWS = st.builds(WindowCounts, st.integers(1, 17), st.integers(8, 16), st.integers(1, 3))


@pytest.fixture
def as_counted(monkeypatch):
    """Compute Gram matrices in one go, and take a second step wherever a first one helped."""
    monkeypatch.setattr(triangle, "BLOCK", 2**40)
    monkeypatch.setattr(gauss_newton_ranks, "STEP_LENGTHS", (1.0, 0.5, 0.25))


@pytest.mark.usefixtures("as_counted")
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("kind", ["dense", "layerwise", "block"])
def test_refits(tmp_path_factory, kind, groups):
    @given(sizes=SIZES, windows=WINDOWS, seed=st.integers(0, 9))
    @settings(max_examples=3, deadline=None)
    def holds(sizes, windows, seed):
        folder = tmp_path_factory.mktemp("refit")
        checkpoint = open_checkpoint(save_tiny(folder / "model", **sizes))
        kept = drawn(checkpoint, groups, seed)
        counted = flops_of(kind, checkpoint, kept, windows, folder)
        dense, left = ModelShape.of(checkpoint), ModelShape.of(checkpoint)
        told = {"num_hidden_layers": len(kept.layers)}
        for name, units in checkpoint.structures.items():
            told |= units.sizes(kept.shape.counts(units)) if name in kept.units else {}
        left = dense.pruned(told)
        if kind == "dense":
            gone = {*range(checkpoint.num_layers)} - {*kept.layers}
            found = dense_refit(dense, left, windows, kv_groups=groups, dropped=[*gone])
        else:
            found = sequential_refit(dense, left, windows, kv_groups=groups, more_iterations=2 * (kind == "block"))
            found += residual_checks(dense, len(kept.layers), windows.length)
        assert found.total == pytest.approx(counted, rel=1e-4)

    holds()


@pytest.mark.usefixtures("as_counted")
@pytest.mark.parametrize("kind", ["layerwise", "block"])
def test_refits_after_a_round_that_refitted_norms(tmp_path, kind):
    """Layers that keep all of their groups run their attention once more than the first round does."""
    dense_checkpoint = open_checkpoint(save_tiny(tmp_path / "dense", num_hidden_layers=3))
    shutil.copytree(tmp_path / "dense", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.mul_(1.25)
    model.save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    every, some = torch.arange(2), torch.tensor([1])
    neurons = [torch.arange(20)] * 3
    kept, windows = Kept((0, 1, 2), {"neurons": neurons, "kv_groups": [every, some, every]}), WindowCounts(5, 12, 2)
    counted = flops_of(kind, checkpoint, kept, windows, tmp_path, dense_checkpoint=dense_checkpoint)
    dense = ModelShape.of(checkpoint)
    told = {}
    for name, units in checkpoint.structures.items():
        told |= units.sizes(kept.shape.counts(units)) if name in kept.units else {}
    found = sequential_refit(
        dense, dense.pruned(told), windows, kv_groups=True, other_norms=True, more_iterations=2 * (kind == "block")
    )
    found += residual_checks(dense, 3, windows.length)
    assert found.total == pytest.approx(counted, rel=1e-4)


@pytest.mark.usefixtures("as_counted")
@pytest.mark.parametrize(("samples", "most"), [(5, 2**15), (7, 50), (1, 50)])
def test_a_refit_of_the_final_norm(tmp_path, monkeypatch, samples, most):
    monkeypatch.setattr(final_norm_refit, "TOKENS", most)
    monkeypatch.setattr(layer_pass_work, "NORM_TOKENS", most)
    checkpoint, world = open_checkpoint(save_tiny(tmp_path / "model")), SoloWorld()
    windows_ST = torch.randint(264, (samples, 12), generator=torch.Generator().manual_seed(0))
    batches = final_norm_refit.micro_batches_of_fit(windows_ST, 2)
    head = LayerReader(checkpoint, torch.float32, world.device).head()
    with counting() as total:
        states = [dense_outputs(checkpoint, batches, torch.float32, world, lambda _done: None) for _ in range(2)]
        states[1] = {index: it * 1.5 for index, it in states[1].items()}
        fit = final_norm_refit.FinalNormRefit(head, batches, *states, world=world, after_each=lambda _done: None).fit()
        counted = total()
    shape = ModelShape.of(checkpoint)
    found = layer_pass_work.final_norm_refit(shape, shape, WindowCounts(samples, 12, 2), passes=len(fit.kl))
    assert len(fit.kl) > 1 and found.total == pytest.approx(counted, rel=1e-4)


@pytest.mark.usefixtures("as_counted")
@pytest.mark.parametrize(("samples", "most"), [(5, 2**15), (7, 50), (1, 50)])
def test_a_refit_of_all_norms(tmp_path, monkeypatch, samples, most):
    monkeypatch.setattr(final_norm_refit, "TOKENS", most)
    monkeypatch.setattr(layer_pass_work, "NORM_TOKENS", most)
    for module, name in ((norms_refit, "AT_ONCE"), (layer_pass_footprint, "NORM_TOKENS_AT_ONCE")):
        monkeypatch.setattr(module, name, 2 * 12 + 5)
    checkpoint, world = open_checkpoint(save_tiny(tmp_path / "model")), SoloWorld()
    windows_ST = torch.randint(264, (samples, 12), generator=torch.Generator().manual_seed(0))
    batches = norms_refit.micro_batches_of_norms(windows_ST, 3)
    with counting() as total:
        dense = dense_outputs(checkpoint, batches, torch.float32, world, lambda _done: None)
        pruned = PrunedLayers(checkpoint, Kept((0,)), {}, torch.float32, world.device)
        gradients = NormGradients(pruned, batches, dense, world=world, after_each=lambda _done: None)
        fit = norms_refit.NormsRefit(gradients, tmp_path / "norms.safetensors", world).fit()
        counted = total()
    shape = ModelShape.of(checkpoint)
    left = shape.pruned({"num_hidden_layers": 1})
    found = layer_pass_work.norms_refit(shape, left, WindowCounts(samples, 12, 3), passes=len(fit.kl))
    assert len(fit.kl) > 1 and found.total == pytest.approx(counted, rel=1e-4)


@pytest.mark.usefixtures("as_counted")
@pytest.mark.parametrize("kind", ["layerwise", "block"])
def test_refits_of_mlps_without_a_gate(tmp_path, kind):
    checkpoint = open_checkpoint(save_model(tmp_path / "model", "arcee", hidden_act="silu"))
    kept = Kept((0, 1, 2), {"neurons": [torch.arange(count) for count in (20, 11, 15)]})
    windows = WindowCounts(5, 12, 2)
    counted = flops_of(kind, checkpoint, kept, windows, tmp_path, vocabulary=64)
    dense = ModelShape.of(checkpoint)
    left = dense.pruned(checkpoint.units.sizes(kept.shape.counts(checkpoint.units)))
    assert left.layers[0].mlp_matrices == 2
    found = sequential_refit(dense, left, windows, kv_groups=False, more_iterations=2 * (kind == "block"))
    found += residual_checks(dense, 3, windows.length)
    assert found.total == pytest.approx(counted, rel=1e-4)


@pytest.mark.usefixtures("as_counted")
@pytest.mark.parametrize("model_type", EXPERTS)
def test_refits_of_experts_and_of_their_attention(tmp_path, model_type):
    """The pass itself, whose routers are not counted, is subtracted; every expert has tokens that are held out."""
    checkpoint = open_checkpoint(save_model(tmp_path / "model", model_type))
    groups = not checkpoint.family.whole_groups
    kept, windows = some_kept(checkpoint, 2 / 3, groups=groups), WindowCounts(13, 48, 4)
    counted = flops_of("dense", checkpoint, kept, windows, tmp_path, vocabulary=64)
    counted -= flops_of("none", checkpoint, kept, windows, tmp_path, vocabulary=64)
    dense, told = ModelShape.of(checkpoint), {}
    for kind in kept.units:
        units = checkpoint.structures[kind]
        told |= units.sizes(kept.shape.counts(units))
    found = dense_refit(dense, dense.pruned(told), windows, kv_groups=groups).total
    assert found - windows.tokens * forward_of_all(dense, windows.length) == pytest.approx(counted, rel=1e-4)


def test_ranks_that_fit_together_wait_for_a_product_a_ridge_and_the_last_weight():
    outputs, channels, kept = 16, 60, 44
    product, error, solved = 2 * outputs * channels**2, 2 * outputs * kept**2, kept**3 / 3 + 2 * kept**2 * outputs
    found = least_squares(outputs, channels, kept)
    assert found.own_float64 == pytest.approx(product + 2 * (solved + error))
    assert found.total == pytest.approx(2 * product + 6 * solved + 7 * error)


def drawn(checkpoint, groups, seed):
    """Draw some units of some layers, the first layer always among them."""
    generator = torch.Generator().manual_seed(seed)
    layers = tuple(range(1 + seed % checkpoint.num_layers))

    def some(size, least):
        count = int(torch.randint(least, size + 1, (1,), generator=generator))
        return torch.randperm(size, generator=generator)[:count].sort().values

    units = {"neurons": [some(checkpoint.units.most, 8) for _ in layers]}
    return Kept(layers, units | ({"kv_groups": [some(2, 1) for _ in layers]} if groups else {}))


def flops_of(kind, checkpoint, kept, windows, folder, vocabulary=264, dense_checkpoint=None):
    """Count the operations of a refit; ``dense_checkpoint`` is another model's of the same shape, if there is one."""
    world, kinds = SoloWorld(), [checkpoint.structures[name] for name in kept.units]
    windows_ST = torch.randint(vocabulary, (windows.count, windows.length), generator=torch.Generator().manual_seed(0))
    dense, pruned = (
        LayerStream(it, windows_ST, torch.float32, windows.micro_batch, world)
        for it in (dense_checkpoint or checkpoint, checkpoint)
    )
    fitted = RefittedLayers(checkpoint, kinds, kind == "block", folder / "fitted")
    if kind == "none":
        with counting() as total:
            for _, layer in dense.layers(range(checkpoint.num_layers)):
                dense.advance(layer)
            return total()
    if kind == "dense":
        refit = DenseRefit(kept, dense, fitted, world)
    else:
        whose = {"dense_layers": kept.layers, "residual": set(), "more_iterations": 2}
        refit = SequentialRefit(checkpoint.family, kept, pruned, dense, fitted, **whose, world=world)
    with counting() as total:
        refit.run(lambda done: None)
        return total()

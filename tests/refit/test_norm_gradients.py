"""Derivatives of a pruned model's divergence by factors on its norms, against autograd through the whole model."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from families import save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from refitting import checkpoint_in, some_kept, windows_of
from transformers import AutoModelForCausalLM
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.norm_factors import norms_of_layers
from hfprune_dist.refit import norm_gradients
from hfprune_dist.refit.measurement import dense_outputs
from hfprune_dist.refit.norm_gradients import NormGradients
from hfprune_dist.refit.pruned_layers import PrunedLayers
from hfprune_dist.structures.kept import Kept

WORLD = SoloWorld()
F64 = torch.float64
DTYPES = [torch.float32, torch.bfloat16]


def nothing(_done):
    pass


def factors_of(shape, seed=0):
    return 1 + 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gradients_of(checkpoint, kept, new, windows_ST, micro_batch, *, dtype=F64, world=WORLD, after_each=nothing):
    batches = dict(enumerate(windows_ST.split(micro_batch)))
    pruned = PrunedLayers(checkpoint, kept, new, dtype, world.device)
    dense = dense_outputs(checkpoint, batches, dtype, world, nothing)
    return NormGradients(pruned, batches, dense, world=world, after_each=after_each)


def by_autograd(checkpoint, new, windows_ST, factors_RC):
    """Return divergence, gradients and mean squares of tokens' gradients, from the whole model with other weights."""
    dense, pruned = (AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=F64).eval() for _ in range(2))
    for name, read in new.items():
        pruned.get_parameter(name).data = read().to(F64)
    names = [f"{checkpoint.family.layers}.{number}.{name}" for number, name in norms_of_layers(checkpoint, range(3))]
    outputs, products = {}, {}
    for row, name in enumerate([*names, checkpoint.family.norm]):

        def multiply(_norm, _inputs, output, row=row):
            outputs[row], products[row] = output, output * factors_RC[row]
            return products[row]

        pruned.get_submodule(name).register_forward_hook(multiply)
    log_p, log_q = (model(windows_ST, use_cache=False).logits.log_softmax(-1) for model in (dense, pruned))
    kl = (log_p.exp() * (log_p - log_q)).sum()
    slopes = torch.autograd.grad(kl, [products[row] for row in range(len(products))])
    terms = [(slope * outputs[row]).detach().flatten(0, 1) for row, slope in enumerate(slopes)]
    tokens, sums = windows_ST.numel(), [(it.sum(dim=0), it.square().sum(dim=0)) for it in terms]
    gradient_RC, squares_RC = (torch.stack(of_norms) / tokens for of_norms in zip(*sums, strict=True))
    return kl.item() / tokens, gradient_RC, squares_RC


def with_another_mlp(checkpoint, layer=1):
    """Return a replacement of one down projection."""
    units = checkpoint.structures["neurons"]
    weight = 0.3 * torch.randn(32, units.counts[layer], generator=torch.Generator().manual_seed(1))
    return {units.output_weight(layer): lambda: weight}


# Norms before blocks, after them, both, one for two blocks; with biases, with 1 + weight, with multipliers.
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "cohere2", "granite", "stablelm", "glm4"])
def test_derivatives_are_those_of_the_whole_model(tmp_path, model_type):
    checkpoint, windows_ST = open_checkpoint(save_model(tmp_path / "model", model_type)), windows_of(3) % 64
    new = with_another_mlp(checkpoint)
    gradients = gradients_of(checkpoint, Kept((0, 1, 2)), new, windows_ST, 2)
    factors_RC = factors_of(gradients.shape)
    there = gradients.at(factors_RC)
    kl, gradient_RC, squares_RC = by_autograd(checkpoint, new, windows_ST, factors_RC)
    assert there.kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    torch.testing.assert_close(there.gradient_RC, gradient_RC, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(there.squares_RC, squares_RC, rtol=1e-3, atol=1e-9)
    assert gradient_RC.abs().amax(dim=1).min() > 0  # each norm matters


@given(windows=st.integers(1, 7), size=st.integers(1, 3), ranks=st.integers(1, 4), dtype=st.sampled_from(DTYPES))
@settings(max_examples=8, deadline=None)
def test_they_have_the_same_bits_on_any_number_of_ranks(windows, size, ranks, dtype):
    with TemporaryDirectory() as folder:
        checkpoint, kept, passed = checkpoint_in(Path(folder) / "model"), some_kept([0, 2]), []

        def there(world):
            made = gradients_of(
                checkpoint, kept, {}, windows_of(windows), size, dtype=dtype, world=world, after_each=passed.append
            )
            return made.at(factors_of(made.shape))

        (alone,) = Ranks(1).run(there)
        assert passed == [1, 2, 3, 4]  # both layers that stay, there and back
        for it in Ranks(ranks).run(there):
            assert it.kl == alone.kl
            assert torch.equal(it.gradient_RC, alone.gradient_RC) and torch.equal(it.squares_RC, alone.squares_RC)


def test_layers_and_units_that_go_have_no_part_in_it(tmp_path):
    checkpoint, kept, windows_ST = checkpoint_in(tmp_path / "model"), some_kept([0, 2]), windows_of(3)
    gradients = gradients_of(checkpoint, kept, {}, windows_ST, 2)
    names = ["input_layernorm", "post_attention_layernorm"]
    assert gradients.norms == [(number, name) for number in (0, 2) for name in names] and gradients.shape == (5, 32)
    factors_RC = factors_of(gradients.shape)
    there, step_RC = gradients.at(factors_RC), 1e-4 * factors_of(gradients.shape, seed=1)
    ahead, behind = (gradients.at(factors_RC + sign * step_RC).kl for sign in (1, -1))
    assert (ahead - behind) / 2 == pytest.approx((there.gradient_RC * step_RC).sum().item(), rel=1e-3)


def test_sums_stay_on_the_device_until_all_micro_batches_are_done(tmp_path, monkeypatch):
    """Otherwise the host would wait for each of them, with a GPU that has nothing to do meanwhile."""
    checkpoint, done = checkpoint_in(tmp_path / "model"), []
    gradients = gradients_of(checkpoint, some_kept([0, 2]), {}, windows_of(3), 1)
    away, through = torch.Tensor.cpu, norm_gradients.run_with_graph
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: done.append("host") or away(self))
    monkeypatch.setattr(norm_gradients, "run_with_graph", lambda *it: done.append("layer") or through(*it))
    gradients.at(factors_of(gradients.shape))
    assert [it for it, _ in itertools.groupby(done)] == ["host", *["layer", "host"] * 2]

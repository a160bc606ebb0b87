"""Factors on all norms of a pruned model: derivatives against autograd through the whole model, and the fit."""

import pytest
import torch
from families import save_model
from hypothesis import given
from hypothesis import strategies as st
from ranks import SoloWorld
from refitting import checkpoint_in, nothing, some_kept, windows_of
from transformers import AutoModelForCausalLM
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core import quasi_newton
from hfprune_dist.core.memory_limits import NORM_TOKENS
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.errors import UserError
from hfprune_dist.models.norm_factors import norms_of_layers
from hfprune_dist.refit.measurement import PrunedLayers
from hfprune_dist.refit.norms_refit import RIDGE, NormGradients, curvature_of, fit_norms, windows_of_norms
from hfprune_dist.structures.kept import Kept

WORLD = SoloWorld()
F64 = torch.float64


def factors_of(shape, seed=0):
    return 1 + 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gradients_of(checkpoint, kept, windows_ST, *, new=None, dtype=F64, world=WORLD, after_each=nothing):
    stream, of_dense = (LayerStream(checkpoint, windows_ST, dtype, 2, world) for _ in range(2))
    of_dense.run_layers(nothing)
    pruned = PrunedLayers(checkpoint, kept, new or {}, stream.reader)
    return NormGradients(pruned, stream, dict(of_dense.final_hidden()), after_each)


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


# Norms before blocks, after them, both, one for two blocks; with biases, with 1 + weight, with multipliers.
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "cohere2", "granite", "stablelm", "glm4"])
def test_derivatives_are_those_of_the_whole_model(tmp_path, model_type):
    checkpoint, windows_ST = open_checkpoint(save_model(tmp_path / "model", model_type)), windows_of(3) % 64
    units = checkpoint.structures["neurons"]
    weight = 0.3 * torch.randn(32, units.counts[1], generator=torch.Generator().manual_seed(1))
    new = {units.tensor(1, units.weights[-1]): lambda: weight}
    gradients = gradients_of(checkpoint, Kept((0, 1, 2)), windows_ST, new=new)
    factors_RC = factors_of(gradients.shape)
    there = gradients.at(factors_RC)
    kl, gradient_RC, squares_RC = by_autograd(checkpoint, new, windows_ST, factors_RC)
    assert there.kl == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    torch.testing.assert_close(there.gradient_RC, gradient_RC, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(there.squares_RC, squares_RC, rtol=1e-3, atol=1e-9)
    assert gradient_RC.abs().amax(dim=1).min() > 0  # each norm matters


def test_layers_and_units_that_go_have_no_part_in_it_and_ranks_share_the_windows(tmp_path):
    checkpoint, kept, windows_ST, passed = checkpoint_in(tmp_path / "model"), some_kept([0, 2]), windows_of(5), []
    gradients = gradients_of(checkpoint, kept, windows_ST, after_each=passed.append)
    names = ["input_layernorm", "post_attention_layernorm"]
    assert gradients.norms == [(number, name) for number in (0, 2) for name in names] and gradients.shape == (5, 32)
    factors_RC = factors_of(gradients.shape)
    there, step_RC = gradients.at(factors_RC), 1e-4 * factors_of(gradients.shape, seed=1)
    assert passed == [1, 2, 3, 4]  # both layers that stay, there and back
    ahead, behind = (gradients.at(factors_RC + sign * step_RC).kl for sign in (1, -1))
    assert (ahead - behind) / 2 == pytest.approx((there.gradient_RC * step_RC).sum().item(), rel=1e-3)
    shared = Ranks(4).run(lambda world: gradients_of(checkpoint, kept, windows_ST, world=world).at(factors_RC))
    for it in shared:  # one of the ranks has nothing to do
        assert it.kl == shared[0].kl == pytest.approx(there.kl, rel=1e-9)
        torch.testing.assert_close(it.gradient_RC, there.gradient_RC, rtol=1e-7, atol=1e-12)


def test_the_divergence_falls_and_is_that_of_the_factors(tmp_path):
    gradients = gradients_of(checkpoint_in(tmp_path / "model"), some_kept([0, 2]), windows_of(5), dtype=torch.float32)
    factors_RC, kls, _ = fit_norms(gradients, gradients)
    assert min(kls) < 0.97 * kls[0]
    assert gradients.at(factors_RC).kl == pytest.approx(min(kls), rel=1e-5)
    assert factors_RC.shape == (5, 32) and (factors_RC != 1).any(dim=1).all()
    there = gradients.at(torch.ones(gradients.shape, dtype=F64))
    gradients.at = lambda _factors: there._replace(kl=0.0, gradient_RC=torch.zeros_like(there.gradient_RC))
    factors_RC, kls, _ = fit_norms(gradients, gradients)  # nothing is lost, so there is nothing to gain
    assert kls == [0.0] and torch.equal(factors_RC, torch.ones(5, 32, dtype=F64))
    gradients.at = lambda _factors: there._replace(gradient_RC=there.gradient_RC * float("nan"))
    with pytest.raises(UserError, match=r"^the norms can't be refitted: .* NaN or infinite; set importance\.dtype"):
        fit_norms(gradients, gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_kept_is_never_worse_on_held_out_windows_and_both_are_told(tmp_path, seed, dtype):
    """Held out are windows that gain from any fit, and a text on which the pruned model is the dense one already."""
    checkpoint, kept, windows_ST = checkpoint_in(tmp_path / "model"), some_kept([0, 2]), windows_of(6, seed=seed)
    fitted, gaining, losing = (gradients_of(checkpoint, kept, windows_ST, dtype=dtype) for _ in range(3))
    ones_RC = torch.ones(fitted.shape, dtype=F64)
    *_, reached = losing._forwards(ones_RC.float())
    losing._dense = {index: losing._head.norm(hidden_BTC) for index, hidden_BTC in reached.items()}
    assert gaining.kl_at(ones_RC) == pytest.approx(fitted.at(ones_RC).kl, rel=1e-5 if dtype == torch.float32 else 0.02)
    for held_out, stays in ((gaining, False), (losing, True)):
        factors_RC, _, told = fit_norms(fitted, held_out)
        assert held_out.kl_at(factors_RC) == min(told) and told[0] == held_out.kl_at(ones_RC)
        assert (told[1] >= told[0]) == torch.equal(factors_RC, ones_RC) == stays


def test_curvature_is_held_up_by_its_norms_mean_and_infinite_where_nothing_matters():
    squares = torch.tensor([[1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=F64)
    found = curvature_of(squares)
    assert torch.equal(found[0], squares[0] + RIDGE) and found[1].isinf().all()
    search = quasi_newton.QuasiNewton(torch.ones(8, dtype=F64), found.flatten())
    search.tell(1.0, torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0], dtype=F64))
    search.tell(0.5, torch.tensor([0.5, 0.4, 0.6, 0.5, 0, 0, 0, 0], dtype=F64))
    assert (search.candidate_P[:4] != 1).all() and torch.equal(search.candidate_P[4:], torch.ones(4).double())


@given(samples=st.integers(1, 300), tokens=st.sampled_from((8, 500, 1024, 3000)))
def test_windows_are_at_even_distances_and_few(samples, tokens):
    numbers = windows_of_norms(torch.arange(samples)[:, None].expand(-1, tokens))[:, 0]
    assert len(numbers) * tokens <= max(NORM_TOKENS, tokens) and len(set(numbers.diff().tolist())) <= 1
    assert len(numbers) == samples or 2 * len(numbers) * tokens > NORM_TOKENS - 2 * tokens

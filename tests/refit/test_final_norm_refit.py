"""Factors on the final norm's outputs, from windows of text."""

import itertools
from dataclasses import replace

import pytest
import torch
from ranks import SoloWorld
from refitting import checkpoint_in, some_kept, windows_of
from worlds import Ranks

from hfprune_dist.core.final_norm import newton_step
from hfprune_dist.core.head import NOTHING, AfterHead
from hfprune_dist.distributed.gram_sums import GramSums
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit import final_norm_refit
from hfprune_dist.refit.final_norm_refit import FinalNormRefit, ProportionateSums, micro_batches_of_fit, pruned_outputs
from hfprune_dist.refit.measurement import dense_outputs, share_of
from hfprune_dist.refit.pruned_layers import PrunedLayers

WORLD = SoloWorld()


def nothing(_done):
    pass


@pytest.fixture
def states(tmp_path):
    """A head, micro-batches, and what the head reads in them, in float32."""
    checkpoint, batches = checkpoint_in(tmp_path / "model"), micro_batches_of_fit(windows_of(8), 2)
    dense = dense_outputs(checkpoint, batches, torch.float32, WORLD, nothing)
    return LayerReader(checkpoint, torch.float32, WORLD.device).head(), batches, dense


def divergence(head, dense, pruned, factors_C):
    log_p, log_q = (
        head.after(torch.cat([*it.values()]).flatten(0, 1).double() * by @ head.weight_VC.double().T).log_softmax(-1)
        for it, by in ((dense, 1.0), (pruned, factors_C))
    )
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize("after", [NOTHING, AfterHead(scale=0.5), AfterHead(scale=2.0, cap=8.0)], ids=str)
def test_states_that_are_too_large_are_made_smaller(states, after):
    head, batches, dense = states
    head = replace(head, weight_VC=6 / after.scale * head.weight_VC, after=after)  # a model that is sure of something
    generator = torch.Generator().manual_seed(0)
    pruned = {index: it * 1.6 + 0.1 * torch.randn(it.shape, generator=generator) for index, it in dense.items()}
    fit = FinalNormRefit(head, batches, dense, pruned, world=WORLD, after_each=nothing).fit()
    assert fit.factors_C.mean() == pytest.approx(1 / 1.6, abs=0.05)
    measured = [divergence(head, dense, pruned, it).item() for it in (1.0, fit.factors_C)]
    assert [fit.kl[0], min(fit.kl)] == pytest.approx(measured, rel=1e-3) and measured[1] < 0.4 * measured[0]


def test_a_model_that_is_as_close_as_it_can_be_stays_as_it_is(states):
    head, batches, dense = states
    fit = FinalNormRefit(head, batches, dense, dense, world=WORLD, after_each=nothing).fit()
    torch.testing.assert_close(fit.factors_C, torch.ones_like(fit.factors_C), rtol=0, atol=1e-3)


def test_few_tokens_are_enough(monkeypatch):
    windows_ST = windows_of(9)
    assert [*micro_batches_of_fit(windows_ST, 2)] == [0, 1, 2, 3, 4]
    monkeypatch.setattr(final_norm_refit, "TOKENS", 2 * 2 * 20)
    batches = micro_batches_of_fit(windows_ST, 2)
    assert [*batches] == [0, 3] and torch.equal(batches[3], windows_ST[6:8])
    monkeypatch.setattr(final_norm_refit, "TOKENS", 1)
    assert [*micro_batches_of_fit(windows_ST, 2)] == [0]


def test_the_pruned_models_layers_are_those_that_it_is_written_with(tmp_path):
    checkpoint, batches = checkpoint_in(tmp_path / "model"), micro_batches_of_fit(windows_of(4), 2)
    name, outputs = "model.layers.2.mlp.down_proj.weight", {}
    for scale in (0.0, 1.0):
        new = {name: lambda scale=scale: torch.full((32, 13), scale)}
        pruned = PrunedLayers(checkpoint, some_kept([0, 2]), new, torch.float32, WORLD.device)
        outputs[scale] = pruned_outputs(pruned, batches, WORLD, nothing)
    assert outputs[0.0].keys() == batches.keys() and not torch.equal(outputs[0.0][1], outputs[1.0][1])


def on_ranks(states, ranks, size=1.6):
    """Fit factors where each rank has what it reads of its share of the micro-batches, and one may have none."""
    head, batches, dense = states
    pruned = {index: it * size for index, it in dense.items()}

    def fitted(world):
        own = [{index: it[index] for index in share_of(batches, world)} for it in (dense, pruned)]
        passes = []
        fit = FinalNormRefit(head, batches, *own, world=world, after_each=passes.append).fit()
        assert passes == [*range(1, len(fit.kl) + 1)]
        return fit

    return Ranks(ranks).run(fitted)


def test_factors_have_the_same_bits_on_any_number_of_ranks(states):
    (alone,) = on_ranks(states, 1)
    for ranks in (2, 5):  # four micro-batches
        for fit in on_ranks(states, ranks):
            assert fit.kl == alone.kl and torch.equal(fit.factors_C, alone.factors_C)


def test_ranks_whose_devices_round_differently_go_the_same_way(states, monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(final_norm_refit, "newton_step", lambda *them: newton_step(*them) * (next(calls) % 3))
    first, *others = on_ranks(states, 3)
    assert all(it.kl == first.kl and torch.equal(it.factors_C, first.factors_C) for it in others)


def test_steps_that_leave_no_curvature_are_followed_by_shorter_ones(states, monkeypatch):
    """A model that is sure of everything, so that the first step leads to one whose gradients are 0 for many tokens."""
    head, batches, dense = states
    sure, found = (replace(head, weight_VC=10 * head.weight_VC), batches, dense), []
    newton = newton_step
    monkeypatch.setattr(final_norm_refit, "newton_step", lambda *them: found.append(them[2]) or newton(*them))
    (alone,) = on_ranks(sure, 1, size=5.0)
    assert len(found) < len(alone.kl), "no step is computed without a curvature"
    assert max(alone.kl) > 100 * alone.kl[0] and min(alone.kl) < alone.kl[0]
    for ranks in (2, 5):
        for fit in on_ranks(sure, ranks, size=5.0):
            assert fit.kl == alone.kl and torch.equal(fit.factors_C, alone.factors_C)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1e10, float("inf"), float("nan")])
@pytest.mark.parametrize("large", range(4))
def test_a_curvature_is_missing_on_all_ranks_or_on_none(ranks, size, large):
    vectors = {index: torch.full((2, 3), size if index == large else 1.0) for index in range(4)}
    ordinary = {**vectors, large: torch.ones(2, 3)}

    def added_up(world, terms):
        sums = ProportionateSums(3, 4, world)
        for index in share_of(dict.fromkeys(terms, torch.zeros(1)), world):
            sums.add(index, terms[index])
        return sums.of_all_ranks()

    assert all(it is None for it in Ranks(ranks).run(lambda world: added_up(world, vectors))) is not (
        large == 0 and size == 1e10
    )
    for total_CC in Ranks(ranks).run(lambda world: added_up(world, ordinary)):
        assert torch.equal(total_CC, torch.full((3, 3), 8.0, dtype=torch.float64))


def test_an_error_of_another_kind_is_no_missing_curvature(monkeypatch):
    def fail(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(GramSums, "_add", fail)
    with pytest.raises(UserError, match="the disk is full"):
        ProportionateSums(3, 4, WORLD).add(0, torch.ones(2, 3))


def test_outputs_that_are_not_finite_are_one_message(states):
    head, batches, dense = states
    broken = {index: torch.full_like(it, torch.nan) for index, it in dense.items()}
    with pytest.raises(UserError, match=r"the final norm can't be refitted: .* NaN or infinite in torch.float32"):
        FinalNormRefit(head, batches, broken, dense, world=WORLD, after_each=nothing).fit()

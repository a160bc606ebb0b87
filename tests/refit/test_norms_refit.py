"""Factors on all norms of a pruned model, from windows of text."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from refitting import checkpoint_in, some_kept, windows_of
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core import quasi_newton
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.errors import UserError
from hfprune_dist.refit.measurement import dense_outputs
from hfprune_dist.refit.norm_gradients import NormGradients
from hfprune_dist.refit.norms_refit import AT_ONCE, RIDGE, TOKENS, NormsRefit, curvature_of, micro_batches_of_norms
from hfprune_dist.refit.pruned_layers import PrunedLayers

WORLD = SoloWorld()


def nothing(_done):
    pass


@pytest.fixture
def model(tmp_path):
    checkpoint_in(tmp_path / "model")
    return tmp_path


def refit_in(folder, *, world=WORLD, windows=5, size=2, dtype=torch.float32, after_each=nothing):
    """Return a refit of a tiny model that loses much."""
    checkpoint, batches = open_checkpoint(folder / "model"), dict(enumerate(windows_of(windows).split(size)))
    dense = dense_outputs(checkpoint, batches, dtype, world, nothing)
    pruned = PrunedLayers(checkpoint, some_kept([0, 2]), {}, dtype, world.device)
    gradients = NormGradients(pruned, batches, dense, world=world, after_each=after_each)
    return NormsRefit(gradients, folder / "norms.safetensors", world)


def test_the_divergence_falls_and_is_that_of_the_factors(model):
    refit = refit_in(model)
    fit = refit.fit()
    assert min(fit.kl) < 0.97 * fit.kl[0]
    assert refit._gradients.at(fit.factors_RC).kl == pytest.approx(min(fit.kl), rel=1e-5)
    assert fit.factors_RC.shape == (5, 32) and (fit.factors_RC != 1).any(dim=1).all()


@given(
    windows=st.integers(1, 6),
    size=st.integers(1, 3),
    ranks=st.integers(2, 4),
    dtype=st.sampled_from(("float32", "bfloat16")),
)
@settings(max_examples=5, deadline=None)
def test_factors_have_the_same_bits_on_any_number_of_ranks(windows, size, ranks, dtype):
    sizes = {"windows": windows, "size": size, "dtype": getattr(torch, dtype)}
    fits = []
    for count in (1, ranks):
        with TemporaryDirectory() as folder:
            checkpoint_in(Path(folder) / "model")
            fits += Ranks(count).run(lambda world, folder=folder: refit_in(Path(folder), world=world, **sizes).fit())
    assert all(it.kl == fits[0].kl and torch.equal(it.factors_RC, fits[0].factors_RC) for it in fits)


def test_a_refit_that_ends_on_its_way_goes_on_with_its_pass(tmp_path):
    checkpoint_in(tmp_path / "whole" / "model")
    whole, layers = refit_in(tmp_path / "whole").fit(), 2 * 2
    for end in (1, 2, 4, 5, 11, layers * len(whole.kl) - 1):
        folder, passed = tmp_path / str(end), []
        checkpoint_in(folder / "model")

        def stop(done, passed=passed, end=end):
            passed.append(done)
            if len(passed) == end:
                raise Interrupted

        with pytest.raises(Interrupted):
            refit_in(folder, after_each=stop).fit()
        fit = refit_in(folder, after_each=stop).fit()
        saved = (end - 1) // layers * layers
        assert passed == [*range(1, end + 1), *range(saved + 1, layers * len(whole.kl) + 1)]
        assert fit.kl == whole.kl and torch.equal(fit.factors_RC, whole.factors_RC)
        again = refit_in(folder, after_each=lambda done: pytest.fail("nothing is left to do")).fit()
        assert again.kl == whole.kl and torch.equal(again.factors_RC, whole.factors_RC)


def test_a_damaged_state_is_set_aside(model):
    whole = refit_in(model).fit()
    file = model / "norms.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(refit_in(model).fit().factors_RC, whole.factors_RC)


def test_what_the_dense_model_has_stays_as_it_is(model, monkeypatch):
    """Where nothing is lost, there is nothing to gain."""
    refit = refit_in(model)
    there = refit._gradients.at(torch.ones(refit._gradients.shape, dtype=torch.float64))
    none = replace(there, kl=0.0, gradient_RC=torch.zeros_like(there.gradient_RC))
    monkeypatch.setattr(refit._gradients, "at", lambda _factors: none)
    fit = refit.fit()
    assert fit.kl == [0.0] and torch.equal(fit.factors_RC, torch.ones(5, 32, dtype=torch.float64))


@pytest.mark.parametrize("what", ["kl", "gradient_RC"])
def test_what_is_not_finite_is_one_message_on_all_ranks(model, what):
    def fails(world):
        refit = refit_in(model, world=world)
        there = refit._gradients.at(torch.ones(refit._gradients.shape, dtype=torch.float64))
        refit._gradients.at = lambda _factors: replace(there, **{what: getattr(there, what) * float("nan")})
        refit.fit()

    with pytest.raises(UserError, match=r"^the norms can't be refitted: .* NaN or infinite; set importance\.dtype"):
        Ranks(2).run(fails)
    assert not (model / "norms.safetensors").exists()


def test_ranks_whose_devices_round_differently_go_the_same_way(model):
    def fitted(world):
        refit = refit_in(model, world=world)
        at = refit._gradients.at

        def rounded(factors_RC):
            there = at(factors_RC)
            return replace(there, gradient_RC=there.gradient_RC * (1 + 1e-3 * world.rank))

        refit._gradients.at = rounded
        return refit.fit()

    first, *others = Ranks(3).run(fitted)
    assert all(it.kl == first.kl and torch.equal(it.factors_RC, first.factors_RC) for it in others)


def test_curvature_is_held_up_by_its_norms_mean_and_infinite_where_nothing_matters():
    squares = torch.tensor([[1.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = curvature_of(squares)
    assert torch.equal(found[0], squares[0] + RIDGE) and found[1].isinf().all()
    search = quasi_newton.QuasiNewton(torch.ones(8, dtype=torch.float64), found.flatten())
    search.tell(1.0, torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.float64))
    search.tell(0.5, torch.tensor([0.5, 0.4, 0.6, 0.5, 0, 0, 0, 0], dtype=torch.float64))
    assert (search.candidate_P[:4] != 1).all() and torch.equal(search.candidate_P[4:], torch.ones(4).double())


@given(samples=st.integers(1, 300), tokens=st.sampled_from((8, 500, 1024, 3000)), size=st.integers(1, 40))
def test_micro_batches_are_small_so_that_many_ranks_have_some(samples, tokens, size):
    batches = micro_batches_of_norms(torch.zeros(samples, tokens, dtype=torch.int64), size)
    assert all(len(it) == 1 or (len(it) <= size and it.numel() <= AT_ONCE) for it in batches.values())
    assert sum(it.numel() for it in batches.values()) <= max(TOKENS, tokens)
    if samples >= 32 and tokens == 1024:
        assert len(batches) >= 16

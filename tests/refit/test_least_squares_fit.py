"""Fits of an output projection by its Gram matrices, against least squares on the tokens themselves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from refitting import MICRO_BATCH, NEURONS, checkpoint_in, refit, some_kept, windows_of
from worlds import Ranks

from hfprune_dist.core.gram import UnresolvedError
from hfprune_dist.core.least_squares import RIDGES, LeastSquares
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.sums import Grams
from hfprune_dist.errors import UserError
from hfprune_dist.refit.cheap_fits import Scored, cheap_fits
from hfprune_dist.refit.least_squares_fit import solve, solve_on_rank0


def grams_of(fitted_ND, held_out_ND):
    return Grams(*(it.T @ it for it in (fitted_ND, held_out_ND)))


def solution(weight_CD, hidden_ND, kept, ridge):
    """Return the kept columns by least squares on tokens, with further rows that pull towards the old columns."""
    scale = math.sqrt(len(hidden_ND))
    pull = math.sqrt(ridge * hidden_ND[:, kept].square().mean())
    inputs = torch.cat([hidden_ND[:, kept] / scale, pull * torch.eye(len(kept), dtype=torch.float64)])
    targets = torch.cat([hidden_ND @ weight_CD.T / scale, pull * weight_CD[:, kept].T])
    return torch.linalg.lstsq(inputs, targets).solution.T


def lost(weight_CD, hidden_ND, kept, new_CK):
    target_NC = hidden_ND @ weight_CD.T
    return ((target_NC - hidden_ND[:, kept] @ new_CK.double().T).square().sum() / target_NC.square().sum()).item()


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30)
@given(st.data(), st.integers(0, 1000))
def test_a_fit_is_least_squares_with_the_ridge_that_is_best_on_held_out_tokens(data, seed):
    channels, hidden = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 4))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, channels - 1), min_size=1, max_size=channels - 1))))
    mixing_DD = drawn(seed, channels, channels)  # makes channels depend on each other
    fitted, held_out = (drawn(seed + n, data.draw(st.integers(1, 30)), channels) @ mixing_DD for n in (1, 2))
    weight_CD, whole = drawn(seed + 3, hidden, channels), torch.cat([fitted, held_out])
    found = solve(weight_CD.float(), grams_of(fitted, held_out), kept)
    weight_CD = weight_CD.float().double()
    errors = [lost(weight_CD, held_out, kept, solution(weight_CD, fitted, kept, ridge)) for ridge in RIDGES]
    # Equally good ones may be taken for each other.
    best = [ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= min(errors) * (1 + 1e-6) + 1e-9]
    both = [[solution(weight_CD, tokens, kept, ridge) for tokens in (fitted, whole)] for ridge in best]
    assert any(
        all(torch.allclose(it.double(), those, 1e-3, 1e-5) for it, those in zip(found, pair, strict=True))
        for pair in both
    )
    assert found.fitted_CK.dtype == found.whole_CK.dtype == torch.float32


WEIGHT, KEPT = drawn(1, 3, 6), torch.tensor([0, 2, 5])
TOKENS, NONE = drawn(2, 20, 6), torch.zeros(4, 6, dtype=torch.float64)


def test_an_expert_without_tokens_to_choose_a_ridge_by_stays_close_to_what_it_was():
    both = grams_of(TOKENS, drawn(3, 10, 6))
    assert torch.equal(solve(WEIGHT, both, KEPT, expert=True).whole_CK, solve(WEIGHT, both, KEPT).whole_CK)
    expected = solution(WEIGHT, TOKENS, KEPT, max(RIDGES)).float()
    for grams in (grams_of(TOKENS, NONE), grams_of(NONE, TOKENS)):
        torch.testing.assert_close(solve(WEIGHT, grams, KEPT, expert=True).whole_CK, expected)
    silent = solve(WEIGHT, grams_of(NONE, NONE), KEPT, expert=True)
    assert torch.equal(silent.whole_CK, WEIGHT[:, KEPT].float())


def test_rank_0_finds_what_every_rank_gets():
    grams = grams_of(TOKENS, drawn(3, 10, 6))
    alone = solve(WEIGHT, grams, KEPT)
    for found in Ranks(3).run(lambda world: solve_on_rank0(WEIGHT, grams, KEPT, world)):
        assert torch.equal(found.fitted_CK, alone.fitted_CK) and torch.equal(found.whole_CK, alone.whole_CK)


@pytest.mark.parametrize("method", ["dense", "layerwise", "cheap"])
def test_every_fit_names_the_layer_whose_gram_matrix_is_rounding_errors(tmp_path, monkeypatch, method):
    checkpoint, kept, windows_ST, world = (
        checkpoint_in(tmp_path / "model"),
        some_kept((0, 1)),
        windows_of(5),
        SoloWorld(),
    )

    def refuse(*_):
        raise UnresolvedError

    def cheap_fit():
        stream = LayerStream(checkpoint, windows_ST, torch.float32, MICRO_BATCH, world)
        _, layer = next(stream.reader.layers([0]))
        scored = Scored(checkpoint.structures["neurons"], [torch.ones(NEURONS)])
        cheap_fits(0, layer, [scored], [(11,)], stream, world)

    monkeypatch.setattr(LeastSquares, "weight", refuse)
    with pytest.raises(UserError, match=r"^activations of layer 0: .* in rounding; check the checkpoint's weights$"):
        if method == "cheap":
            cheap_fit()
        else:
            refit(method, checkpoint, kept, tmp_path / "fitted", world=world, windows_ST=windows_ST)

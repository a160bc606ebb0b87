import pytest
import torch

from hfprune_dist.core import elimination
from hfprune_dist.core.elimination import RIDGE, eliminate, elimination_scores
from hfprune_dist.core.gram import UnresolvedError, ridge_of

D, C, T = 20, 6, 400


def layer(seed=0):
    """Return correlated neurons, a weight and gradients, all float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64) @ mix
    gradient_TC = torch.randn(T, C, generator=generator, dtype=torch.float64) * torch.arange(1, C + 1)
    weight_CD = torch.randn(C, D, generator=generator, dtype=torch.float64)
    gram = hidden_TD.T @ hidden_TD / T
    return gram, gradient_TC.T @ gradient_TC / T, weight_CD


def independent(gram, curvature, weight, channels=1):
    """Fisher scores of units with independent activations and gradients: no other units can compensate for them."""
    products = (gram * (weight.T @ curvature @ weight)).unflatten(1, (-1, channels)).unflatten(0, (-1, channels))
    return products.sum((1, 3)).diagonal()


def cost_of_removing(gram, curvature, weight, removed, channels=1):
    """1/2 tr(F E G E^T), where E is the change of the weight when the rest is refitted by least squares."""
    gram = gram + torch.diag(ridge_of(RIDGE, gram.diagonal(), (weight.T @ curvature @ weight).diagonal()))
    stay = [n for n in range(D) if n // channels not in removed]
    refitted = torch.zeros_like(weight)
    if stay:
        refitted[:, stay] = weight @ gram[:, stay] @ gram[stay][:, stay].inverse()
    error = weight - refitted
    return 0.5 * torch.trace(curvature @ error @ gram @ error.T)


CHANNELS = pytest.mark.parametrize("channels", [1, 5, 20])


@CHANNELS
def test_each_removal_costs_what_least_squares_says(channels, monkeypatch):
    monkeypatch.setattr(elimination, "BLOCK", 1)
    gram, curvature, weight = layer()
    fisher = independent(gram, curvature, weight, channels)
    order, costs = eliminate(gram, curvature, weight, fisher)
    removed = []
    for unit, cost in zip(order.tolist(), costs, strict=True):
        before = cost_of_removing(gram, curvature, weight, removed, channels)
        removed.append(unit)
        torch.testing.assert_close(cost, cost_of_removing(gram, curvature, weight, removed, channels) - before)
    assert sorted(removed) == list(range(D // channels))


@CHANNELS
def test_a_first_removal_goes_half_way_to_the_exact_fisher_score(channels, monkeypatch):
    monkeypatch.setattr(elimination, "BLOCK", D)
    gram, curvature, weight = layer()
    fisher = independent(gram, curvature, weight, channels)
    for factor in (9, 0.25):
        order, costs = eliminate(gram, curvature, weight, factor * fisher)
        alone = [cost_of_removing(gram, curvature, weight, [unit], channels) for unit in order.tolist()]
        torch.testing.assert_close(costs, factor**0.5 * torch.stack(alone))


@pytest.mark.parametrize(("waiting", "channels"), [(1, 1), (3, 2), (100, 2)])
def test_it_does_not_matter_how_many_updates_wait(waiting, channels, monkeypatch):
    gram, curvature, weight = layer()
    arguments = gram, curvature, weight, 2 * independent(gram, curvature, weight, channels)
    monkeypatch.setattr(elimination, "BLOCK", 2 * channels)
    order, costs = eliminate(*arguments)
    monkeypatch.setattr(elimination, "WAITING", waiting)
    found_order, found_costs = eliminate(*arguments)
    assert torch.equal(found_order, order)
    torch.testing.assert_close(found_costs, costs)


def test_scores_rise_strictly_in_the_order_of_removal():
    gram, curvature, weight = layer()
    order, _ = eliminate(gram, curvature, weight, independent(gram, curvature, weight))
    scores = elimination_scores(gram, curvature, weight, independent(gram, curvature, weight))
    assert (scores[order].diff() > 0).all()
    nothing = elimination_scores(gram, torch.zeros_like(curvature), weight, torch.zeros(D, dtype=torch.float64))
    assert len(nothing.unique()) == D


def test_neurons_of_a_silent_layer_cost_nothing():
    _, curvature, weight = layer()
    silent, zeros = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    scores = elimination_scores(silent, curvature, weight, zeros)
    assert (scores < 1e-290).all() and len(scores.unique()) == D


@CHANNELS
def test_a_unit_too_quiet_for_the_rounded_gram_matrix_goes_first(channels, monkeypatch):
    monkeypatch.setattr(elimination, "BLOCK", 1)
    gram, curvature, weight = layer()
    quiet = slice(0, channels)
    gram[quiet] = gram[:, quiet] = 0
    fisher = independent(gram, curvature, weight, channels)
    fisher[0] = 1e-20
    order, costs = eliminate(gram, curvature, weight, fisher)
    assert order[0] == 0
    silent = fisher.clone()
    silent[0] = 0
    assert torch.equal(costs, eliminate(gram, curvature, weight, silent)[1])


def test_a_column_that_no_gradient_touches_has_a_score_however_its_zero_is_rounded():
    gram, _, weight = layer()
    direction_C = torch.nn.functional.normalize(weight[:, 4], dim=0)
    curvature = torch.eye(C, dtype=torch.float64) - (1 + 1e-14) * torch.outer(direction_C, direction_C)
    assert weight[:, 4] @ curvature @ weight[:, 4] < 0
    fisher = independent(gram, curvature, weight).clamp(min=0)
    fisher[4] = 1e-20
    scores = elimination_scores(gram, curvature, weight, fisher)
    assert scores.isfinite().all() and scores.argmin() == 4


@CHANNELS
@pytest.mark.parametrize("what", ["gram matrix", "inverse", "rows that are removed"])
def test_rounding_errors_are_refused_whatever_they_make_impossible(channels, what, monkeypatch):
    gram, curvature, weight = layer()
    fisher = independent(gram, curvature, weight, channels)
    if what == "gram matrix":
        gram.diagonal()[3] = -10 * gram.diagonal().sum()
    elif channels == 1 and what == "inverse":
        return  # a number, which any other can be divided by
    else:
        broken = -torch.eye(D).double() if what == "inverse" else torch.zeros(D, D).double()
        monkeypatch.setattr(elimination, "damped_inverse", lambda *_: broken)
        if what == "rows that are removed":
            monkeypatch.setattr(elimination, "_traces", lambda inverse_Ucc, _: torch.ones(len(inverse_Ucc)))
    with pytest.raises(UnresolvedError, match="lost in rounding"):
        elimination_scores(gram, curvature, weight, fisher)

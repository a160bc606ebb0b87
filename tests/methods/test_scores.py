"""Scores from sums, compared with what the papers define."""

import dataclasses
import itertools

import pytest
import torch
from core_definition import fluctuation

from hfprune_dist.core.criterion import ScoredLayer
from hfprune_dist.methods import CRITERIA
from hfprune_dist.methods.sdmprune import student_keeps
from hfprune_dist.structures import ALL_KINDS, EXPERTS, NEURONS


def some_layer(number=0, seed=0):
    generator = torch.Generator().manual_seed(number)
    rows = [torch.randn(6, 4, generator=generator).bfloat16() for _ in range(2)]
    column = torch.randn(4, 6, generator=generator).bfloat16()
    return ScoredLayer(number, 6, NEURONS, seed, lambda: rows, lambda: column)


def unread():
    raise AssertionError("these weights are not needed")


def score(name, sums, layer):
    return CRITERIA[name].score(sums, layer)


def test_activation_l1_is_what_wanda_sp_scores():
    """|W| times the root mean square of h, averaged over rows; summed over a unit's channels; all up to a factor."""
    layer = dataclasses.replace(some_layer(), units=2)
    hidden = torch.randn(9, 6, dtype=torch.float64)
    weight = layer.read_columns().double()
    metric = (weight.abs() * hidden.square().mean(0).sqrt()).mean(0).reshape(2, 3).sum(1)
    factor = score("activation_l1", CRITERIA["activation_l1"].reduce(hidden).sum(0), layer) / metric
    torch.testing.assert_close(factor, torch.full((2,), len(weight) * 9**0.5, dtype=torch.float64))


@pytest.mark.parametrize("units", [6, 2, 1])
def test_fluctuation_is_what_flap_scores_also_where_means_dwarf_deviations(units):
    """From sums of h and of h^2, nine of whose sixteen digits belong to the means."""
    layer = dataclasses.replace(some_layer(), units=units, tokens=50)
    hidden = torch.randn(50, 6, dtype=torch.float64) + 3e4 * torch.randn(6, dtype=torch.float64)
    expected = fluctuation(hidden, layer.read_columns().double(), channels=6 // units)
    found = score("fluctuation", CRITERIA["fluctuation"].reduce(hidden).sum(0), layer)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_layers_whose_channels_all_fluctuate_alike_have_scores_nonetheless():
    constant = torch.tensor([[2.0, 2.0]], dtype=torch.float64).repeat(6, 1).flatten()
    still = score("fluctuation", constant, dataclasses.replace(some_layer(), tokens=2, units=2))
    assert torch.equal(still, torch.tensor([0.0, 0.0], dtype=torch.float64)), "in which nothing varies over tokens"
    one = ScoredLayer(0, 1, NEURONS, 0, unread, lambda: torch.ones(3, 1), tokens=2)
    assert score("fluctuation", torch.tensor([2.0, 10.0]).double(), one).isfinite().all()


def test_magnitude_is_the_norm_of_all_weights_that_go_with_the_neuron():
    layer = some_layer()
    scores = score("magnitude", torch.zeros(6), layer)
    for neuron in range(6):
        owned = [row[neuron] for row in layer.read_rows()] + [layer.read_columns()[:, neuron]]
        torch.testing.assert_close(scores[neuron], torch.cat(owned).double().norm())


def test_reap_is_a_mean_over_the_tokens_that_an_expert_is_given():
    outputs, weights = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    sums = torch.cat([CRITERIA["reap"].reduce(outputs, weights).sum(0), torch.zeros(2, dtype=torch.float64)])
    expected = torch.stack([(weights * outputs.norm(dim=1)).mean(), torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(score("reap", sums, ScoredLayer(0, 2, EXPERTS, 0, unread, unread)), expected)


def test_a_student_lacks_the_tenth_that_scores_least():
    scores = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keeps = student_keeps(scores, 0.1)
    assert (~keeps).sum() == 4 and scores[~keeps].max() < scores[keeps].min()


def test_random_scores_depend_on_the_seed_the_kind_and_the_layer():
    def scores(seed, kind, number):
        return score("random", torch.zeros(6), ScoredLayer(number, 6, kind, seed, unread, unread))

    all_given = list(itertools.product((0, 1, 2**16), ALL_KINDS, (0, 1, 2)))
    found = {tuple(scores(*given).tolist()) for given in all_given}
    assert len(found) == len(all_given) and found == {tuple(scores(*given).tolist()) for given in all_given}

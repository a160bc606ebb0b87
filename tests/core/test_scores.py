import dataclasses

import pytest
import torch
from core_definition import fluctuation

from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.scores import ScoredLayer, scores_from_sums, student_keeps


def some_layer(number=0, seed=0):
    generator = torch.Generator().manual_seed(number)
    rows = [torch.randn(6, 4, generator=generator).bfloat16() for _ in range(2)]
    column = torch.randn(4, 6, generator=generator).bfloat16()
    return ScoredLayer(number, 6, seed, lambda: rows, lambda: column)


def unread():
    raise AssertionError("these weights are not needed")


def test_gradient_sums_are_scores_and_need_no_weights():
    layer, sums = ScoredLayer(0, 6, 0, unread, unread), torch.rand(6, dtype=torch.float64)
    for criterion in CRITERIA.values():
        if criterion.summed == "gradient" and not criterion.needs_moments:
            assert torch.equal(scores_from_sums(criterion, sums, layer), sums)


def test_activation_is_the_norm_of_what_the_neuron_adds_to_the_residual_stream():
    """||h_n|| * ||W[:, n]||: the Frobenius norm of the outer product over tokens."""
    layer = some_layer()
    hidden = torch.randn(9, 6, dtype=torch.float64)
    scores = scores_from_sums(CRITERIA["activation"], hidden.square().sum(0), layer)
    for neuron in range(6):
        added = hidden[:, neuron].outer(layer.read_columns()[:, neuron].double())
        torch.testing.assert_close(scores[neuron], added.norm())


def test_activation_l1_is_what_wanda_sp_scores():
    """|W| times the root mean square of h, averaged over rows; summed over a unit's channels; all up to a factor."""
    layer = dataclasses.replace(some_layer(), units=2)
    hidden = torch.randn(9, 6, dtype=torch.float64)
    scores = scores_from_sums(CRITERIA["activation_l1"], hidden.square().sum(0), layer)
    weight = layer.read_columns().double()
    metric = (weight.abs() * hidden.square().mean(0).sqrt()).mean(0).reshape(2, 3).sum(1)
    torch.testing.assert_close(scores / metric, torch.full((2,), len(weight) * 9**0.5, dtype=torch.float64))
    assert not torch.allclose(scores, scores_from_sums(CRITERIA["activation"], hidden.square().sum(0), layer))


@pytest.mark.parametrize("units", [6, 2, 1])
def test_fluctuation_is_what_flap_scores_also_where_means_dwarf_deviations(units):
    """From sums of h and of h^2, nine of whose sixteen digits belong to the means."""
    layer = dataclasses.replace(some_layer(), units=units, tokens=50)
    hidden = torch.randn(50, 6, dtype=torch.float64) + 3e4 * torch.randn(6, dtype=torch.float64)
    sums = torch.stack([hidden.sum(0), hidden.square().sum(0)], dim=1).flatten()
    expected = fluctuation(hidden, layer.read_columns().double(), channels=6 // units)
    torch.testing.assert_close(scores_from_sums(CRITERIA["fluctuation"], sums, layer), expected, rtol=1e-5, atol=0)


def test_layers_whose_channels_all_fluctuate_alike_have_scores_nonetheless():
    constant = torch.tensor([[2.0, 2.0]], dtype=torch.float64).repeat(6, 1).flatten()
    still = scores_from_sums(CRITERIA["fluctuation"], constant, dataclasses.replace(some_layer(), tokens=2, units=2))
    assert torch.equal(still, torch.tensor([0.0, 0.0], dtype=torch.float64)), "in which nothing varies over tokens"
    one = ScoredLayer(0, 1, 0, unread, lambda: torch.ones(3, 1), tokens=2)
    assert scores_from_sums(CRITERIA["fluctuation"], torch.tensor([2.0, 10.0]).double(), one).isfinite().all()


def test_activation_of_several_channels_weighs_each_with_its_own_column():
    layer = dataclasses.replace(some_layer(), units=2)
    hidden = torch.randn(9, 6, dtype=torch.float64)
    scores = scores_from_sums(CRITERIA["activation"], hidden.square().sum(0), layer)
    alone = scores_from_sums(CRITERIA["activation"], hidden.square().sum(0), some_layer())
    for unit in range(2):
        torch.testing.assert_close(scores[unit], alone[3 * unit : 3 * unit + 3].norm())


def test_magnitude_is_the_norm_of_all_weights_that_go_with_the_neuron():
    layer = some_layer()
    scores = scores_from_sums(CRITERIA["magnitude"], torch.zeros(6), layer)
    for neuron in range(6):
        owned = [row[neuron] for row in layer.read_rows()] + [layer.read_columns()[:, neuron]]
        torch.testing.assert_close(scores[neuron], torch.cat(owned).double().norm())


def test_a_student_lacks_the_tenth_that_scores_least():
    scores = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keeps = student_keeps(scores, 0.1)
    assert (~keeps).sum() == 4 and scores[~keeps].max() < scores[keeps].min()


def test_random_scores_depend_on_the_seed_and_the_layer():
    def scores(number, seed):
        return scores_from_sums(CRITERIA["random"], torch.zeros(6), ScoredLayer(number, 6, seed, unread, unread))

    assert torch.equal(scores(1, 2), scores(1, 2))
    assert not torch.equal(scores(1, 2), scores(2, 2)) and not torch.equal(scores(1, 2), scores(1, 3))

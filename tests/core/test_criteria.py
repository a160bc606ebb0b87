import dataclasses

import pytest
import torch
from core_definition import fluctuation

from hfprune_dist.core import bound_losses, scores
from hfprune_dist.core.bound_losses import Batch, bind
from hfprune_dist.core.criteria import CRITERIA, losses_of
from hfprune_dist.core.head import Rows
from hfprune_dist.core.losses import SIGN_TOKENS
from hfprune_dist.core.scores import ScoredLayer, finished, student_keeps


def some_layer(number=0, seed=0):
    generator = torch.Generator().manual_seed(number)
    rows = [torch.randn(6, 4, generator=generator).bfloat16() for _ in range(2)]
    column = torch.randn(4, 6, generator=generator).bfloat16()
    return ScoredLayer(number, 6, seed, lambda: rows, lambda: column)


def unread():
    raise AssertionError("these weights are not needed")


def test_criteria_of_one_loss_share_it():
    losses = losses_of([CRITERIA[name] for name in ("fisher", "entropy", "activation", "entropy_squared", "random")])
    assert [loss.name for loss in losses] == ["sampled_label", "entropy"]


def test_what_the_table_announces_there_is_a_function_for():
    assert set(scores._MADE_OF_SUMS) == {name for name, criterion in CRITERIA.items() if not criterion.is_its_sum}
    assert set(bound_losses._BINDINGS) == set(losses_of(CRITERIA.values()))


@pytest.mark.parametrize("criterion", ["entropy", "cross_entropy", "fisher", "fisher_signs"])
def test_neither_chunks_nor_micro_batches_change_what_a_loss_draws(criterion):
    windows, tokens, vocabulary = (7, 3), 2 * SIGN_TOKENS + 20, 40
    input_ids = torch.randint(vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0))
    logits = torch.randn(2 * tokens, vocabulary, generator=torch.Generator().manual_seed(1)).double()

    def gradients(batches, chunk):
        for places in batches:
            batch = Batch(input_ids[places], [windows[place] for place in places], vocabulary, 0)
            bound = bind(CRITERIA[criterion].loss, batch)
            some = logits.view(2, tokens, vocabulary)[places].flatten(0, 1)
            for start in range(0, len(some), chunk):
                rows = slice(start, min(start + chunk, len(some)))
                yield bound(Rows(some[rows].clone(), rows))[1]

    whole = torch.cat(list(gradients([[0, 1]], 2 * tokens)))
    for chunk in (1, 50, SIGN_TOKENS, tokens + 1):
        assert torch.equal(torch.cat(list(gradients([[0, 1]], chunk))), whole)
        assert torch.equal(torch.cat(list(gradients([[0], [1]], chunk))), whole)


def test_gradient_sums_are_scores_and_need_no_weights():
    layer, sums = ScoredLayer(0, 6, 0, unread, unread), torch.rand(6, dtype=torch.float64)
    for criterion in CRITERIA.values():
        if criterion.summed == "gradient" and not criterion.needs_moments:
            assert torch.equal(finished(criterion, sums, layer), sums)


def test_activation_is_the_norm_of_what_the_neuron_adds_to_the_residual_stream():
    """||h_n|| * ||W[:, n]||: the Frobenius norm of the outer product over tokens."""
    layer = some_layer()
    hidden = torch.randn(9, 6, dtype=torch.float64)
    scores = finished(CRITERIA["activation"], hidden.square().sum(0), layer)
    for neuron in range(6):
        added = hidden[:, neuron].outer(layer.read_columns()[:, neuron].double())
        torch.testing.assert_close(scores[neuron], added.norm())


def test_activation_l1_is_what_wanda_sp_scores():
    """|W| times the root mean square of h, averaged over rows; summed over a unit's channels; all up to a factor."""
    layer = dataclasses.replace(some_layer(), units=2)
    hidden = torch.randn(9, 6, dtype=torch.float64)
    scores = finished(CRITERIA["activation_l1"], hidden.square().sum(0), layer)
    weight = layer.read_columns().double()
    metric = (weight.abs() * hidden.square().mean(0).sqrt()).mean(0).reshape(2, 3).sum(1)
    torch.testing.assert_close(scores / metric, torch.full((2,), len(weight) * 9**0.5, dtype=torch.float64))
    assert not torch.allclose(scores, finished(CRITERIA["activation"], hidden.square().sum(0), layer))


@pytest.mark.parametrize("units", [6, 2, 1])
def test_fluctuation_is_what_flap_scores_also_where_means_dwarf_deviations(units):
    """From sums of h and of h^2, nine of whose sixteen digits belong to the means."""
    layer = dataclasses.replace(some_layer(), units=units, tokens=50)
    hidden = torch.randn(50, 6, dtype=torch.float64) + 3e4 * torch.randn(6, dtype=torch.float64)
    sums = torch.stack([hidden.sum(0), hidden.square().sum(0)], dim=1).flatten()
    expected = fluctuation(hidden, layer.read_columns().double(), channels=6 // units)
    torch.testing.assert_close(finished(CRITERIA["fluctuation"], sums, layer), expected, rtol=1e-5, atol=0)


def test_layers_whose_channels_all_fluctuate_alike_have_scores_nonetheless():
    constant = torch.tensor([[2.0, 2.0]], dtype=torch.float64).repeat(6, 1).flatten()
    still = finished(CRITERIA["fluctuation"], constant, dataclasses.replace(some_layer(), tokens=2, units=2))
    assert torch.equal(still, torch.tensor([0.0, 0.0], dtype=torch.float64)), "in which nothing varies over tokens"
    one = ScoredLayer(0, 1, 0, unread, lambda: torch.ones(3, 1), tokens=2)
    assert finished(CRITERIA["fluctuation"], torch.tensor([2.0, 10.0]).double(), one).isfinite().all()


def test_activation_of_several_channels_weighs_each_with_its_own_column():
    layer = dataclasses.replace(some_layer(), units=2)
    hidden = torch.randn(9, 6, dtype=torch.float64)
    scores = finished(CRITERIA["activation"], hidden.square().sum(0), layer)
    alone = finished(CRITERIA["activation"], hidden.square().sum(0), some_layer())
    for unit in range(2):
        torch.testing.assert_close(scores[unit], alone[3 * unit : 3 * unit + 3].norm())


def test_magnitude_is_the_norm_of_all_weights_that_go_with_the_neuron():
    layer = some_layer()
    scores = finished(CRITERIA["magnitude"], torch.zeros(6), layer)
    for neuron in range(6):
        owned = [row[neuron] for row in layer.read_rows()] + [layer.read_columns()[:, neuron]]
        torch.testing.assert_close(scores[neuron], torch.cat(owned).double().norm())


def test_a_student_lacks_the_tenth_that_scores_least():
    scores = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keeps = student_keeps(scores)
    assert (~keeps).sum() == 4 and scores[~keeps].max() < scores[keeps].min()


def test_random_scores_depend_on_the_seed_and_the_layer():
    def scores(number, seed):
        return finished(CRITERIA["random"], torch.zeros(6), ScoredLayer(number, 6, seed, unread, unread))

    assert torch.equal(scores(1, 2), scores(1, 2))
    assert not torch.equal(scores(1, 2), scores(2, 2)) and not torch.equal(scores(1, 2), scores(1, 3))

from hfprune_dist.core import bound_losses, scores
from hfprune_dist.core.criteria import CRITERIA, losses_of


def test_criteria_of_one_loss_share_it():
    losses = losses_of([CRITERIA[name] for name in ("fisher", "entropy", "activation", "cross_entropy", "random")])
    assert [loss.name for loss in losses] == ["sampled_label", "entropy", "cross_entropy"]


def test_what_the_table_announces_there_is_a_function_for():
    assert set(scores._MADE_OF_SUMS) == {name for name, criterion in CRITERIA.items() if not criterion.is_its_sum}
    assert set(bound_losses._BINDINGS) == set(losses_of(CRITERIA.values()))

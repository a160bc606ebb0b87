import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.methods import CRITERIA
from hfprune_dist.structures.score_names import criteria_in, score_name, scores_of_layers


def test_neurons_have_the_names_that_they_always_had():
    assert score_name(3, "entropy") == score_name(3, "entropy", "neurons") == "layers.3.entropy"
    assert score_name(3, "entropy", "kv_groups") == "layers.3.kv_groups.entropy"


@given(
    layers=st.integers(1, 120),
    criteria=st.sets(st.sampled_from(sorted(CRITERIA)), min_size=1),
    kinds=st.sampled_from((["neurons"], ["neurons", "kv_groups"])),
)
def test_scores_are_found_by_criterion_and_kind_in_the_order_of_layers(layers, criteria, kinds):
    scores = {
        score_name(layer, criterion, kind): (layer, criterion, kind)
        for kind in kinds
        for criterion in criteria
        for layer in range(layers)
    }
    assert len(scores) == layers * len(criteria) * len(kinds)
    assert criteria_in(scores) == sorted(criteria)
    for kind in kinds:
        for criterion in criteria:
            found = scores_of_layers(scores, criterion, kind)
            assert found == [(layer, criterion, kind) for layer in range(layers)]


@pytest.mark.parametrize("kind", ["neurons", "kv_groups"])
def test_what_was_not_scored_has_no_layers(kind):
    assert scores_of_layers({"layers.0.fisher": 1}, "entropy", kind) == []

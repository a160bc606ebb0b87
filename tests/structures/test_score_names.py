from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.methods import CRITERIA
from hfprune_dist.structures.score_names import criteria_in, score_name, scores_of_layers


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

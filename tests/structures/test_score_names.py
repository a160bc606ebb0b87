from hfprune_dist.methods import CRITERIA
from hfprune_dist.structures.score_names import criteria_in, score_name, scores_of_layers


def test_scores_are_found_by_criterion_and_kind_in_the_order_of_layers():
    places = [(layer, name, kind) for kind in ("neurons", "kv_groups") for name in CRITERIA for layer in range(12)]
    scores = {score_name(*place): place for place in places}
    assert len(scores) == len(places) and criteria_in(scores) == sorted(CRITERIA)
    for _, name, kind in places:
        assert scores_of_layers(scores, name, kind) == [(layer, name, kind) for layer in range(12)]

"""Numbers of experts at a ratio, against routers that transformers makes."""

import math
import re

import pytest
import torch
from headers import CONFIG, checkpoint_of, grouped_mixtures
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from hfprune_dist.checkpoints.pruned_config import is_plain, pruned_config
from hfprune_dist.checkpoints.token_costs import TokenCosts
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.expert_shapes import WholeExpertTarget
from hfprune_dist.planning.known_shapes import Span, dense_shape, known_shape
from hfprune_dist.planning.ratios import check_ratios, remarks_on_shapes
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import EXPERTS

LIKE_HFPRUNE = {"criterion": "entropy", "structures": ["experts"]}


def target(checkpoint, ratio, multiple_of=1):
    return WholeExpertTarget(ShapeTarget(checkpoint, ratio, ("experts",), multiple_of, "here"))


def number_of(checkpoint, shape):
    """Return how many experts are kept by each layer that has some."""
    assert shape.units.keys() == {EXPERTS}
    kept, there = shape.units[EXPERTS], checkpoint.structures[EXPERTS].counts
    assert [bool(count) for count in kept] == [bool(count) for count in there]
    (number,) = {*kept} - {0}
    return number


def suffices(config, number):
    """Check whether a router can choose among so many experts."""
    groups = config.get("n_group", 1)
    if number % groups or number < max(2, config["num_experts_per_tok"]):
        return False
    sizes = {"n_routed_experts": number, "num_experts_per_tok": config["num_experts_per_tok"], "hidden_size": 8}
    routing = {"n_group": groups, "topk_group": config.get("topk_group", 1)}
    if "n_group" not in config:  # no scores of groups
        return True
    try:
        router = DeepseekV3TopkRouter(DeepseekV3Config(**sizes, **routing))
        # Scores of a group that isn't chosen are -inf.
        router.e_score_correction_bias.copy_(torch.rand(number) + 10)
        _, weights, chosen = router(torch.randn(5, 8))
    except RuntimeError:
        return False
    of_groups = [len({*row}) for row in (chosen // (number // groups)).tolist()]
    return max(of_groups) <= routing["topk_group"] and bool(weights.isfinite().all())


@given(grouped_mixtures(), st.floats(0.01, 0.95), st.sampled_from([1, 2, 4]))
def test_the_most_experts_with_which_the_ratio_goes(config, ratio, multiple_of):
    checkpoint, step = checkpoint_of(config), math.lcm(multiple_of, config.get("n_group", 1))
    asked, counts = target(checkpoint, ratio, multiple_of), checkpoint.parameter_counts
    possible = [it for it in range(1, config["num_experts"]) if it % multiple_of == 0 and suffices(config, it)]
    assert asked.largest() == (counts.ratio(asked._with(possible[0])) if possible else 0)
    if ratio > asked.largest():
        with pytest.raises(UserError, match=r"by pruning experts alone, of which .* must stay: .*; the largest"):
            asked.shape()
        return
    shape = asked.shape()
    number = number_of(checkpoint, shape)
    assert number in possible and counts.ratio(shape) >= ratio and is_plain(checkpoint, shape)
    if number + step < config["num_experts"]:
        assert counts.ratio(asked._with(number + step)) < ratio


@given(grouped_mixtures(), st.floats(0.05, 0.5))
def test_all_that_counts_experts_knows_how_many_are_left(config, ratio):
    checkpoint = checkpoint_of(config)
    asked = target(checkpoint, ratio)
    if ratio > asked.largest():
        return
    shape = asked.shape()
    number = number_of(checkpoint, shape)
    config_file = pruned_config(checkpoint, shape)
    assert {key: it for key, it in config_file.items() if config.get(key) != it} == {
        "num_experts": number,
        "tie_word_embeddings": True,
    }
    left = checkpoint_of(config_file)
    assert left.parameters == checkpoint.parameter_counts.of(shape)
    routers = (1 + ("n_group" in config) / 64) * (config["num_experts"] - number) * len(left.family.experts.layers)
    assert TokenCosts.of(left).active_parameters == TokenCosts.of(checkpoint).active_parameters - 64 * routers
    method = Method(**LIKE_HFPRUNE)
    known = known_shape(checkpoint, ratio, method, "here")
    assert known.experts == Span(number, number) == dense_shape(left).experts
    assert known.width == dense_shape(checkpoint).width == dense_shape(left).width
    assert known.reached.least == checkpoint.parameter_counts.ratio(shape)


@pytest.fixture(scope="module")
def checkpoint():
    layers = {"num_hidden_layers": 2, "intermediate_size": 64, "first_k_dense_replace": 0, "moe_intermediate_size": 64}
    routing = {"num_experts": 12, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1}
    return checkpoint_of({**CONFIG, **layers, **routing})


def test_a_ratio_out_of_reach_is_told_with_the_reason(checkpoint):
    told = (
        "here: ratio 0.9 can't be reached by pruning experts alone, of which 6 of 12 in each layer must stay: a token "
        "goes to 3, and routing wants as many in each of 2 groups; the largest possible is "
    )
    with pytest.raises(UserError, match=f"^{re.escape(told)}"):
        check_ratios(checkpoint, [0.9], Method(**LIKE_HFPRUNE), "here")


def test_where_a_token_goes_to_one_expert_the_other_that_stays_is_told(checkpoint):
    lone = checkpoint_of({**checkpoint.config, "num_experts_per_tok": 1, "n_group": 1})
    told = "2 of 12 in each layer must stay: a token goes to 1, and a mixture has 2 at least; the largest"
    with pytest.raises(UserError, match=told):
        check_ratios(lone, [0.9], Method(**LIKE_HFPRUNE), "here")


def test_multiples_are_of_experts(checkpoint):
    for settings, expected in (({}, 8), ({"multiple_of": "auto"}, 8), ({"multiple_of": 3}, 6)):
        method = Method(**LIKE_HFPRUNE, **settings)
        check_ratios(checkpoint, [0.25], method, "here")
        assert known_shape(checkpoint, 0.25, method, "here").experts == Span(expected, expected)
    told = r"ratios 0\.3 and 0\.301 .* once numbers of experts are rounded to multiples of 2; leave one of them out$"
    with pytest.raises(UserError, match=told):
        check_ratios(checkpoint, [0.3, 0.301], Method(**LIKE_HFPRUNE), "here")
    with pytest.raises(UserError, match="multiple_of comes to 16, but layers have 12 experts at most"):
        check_ratios(checkpoint, [0.3], Method(**LIKE_HFPRUNE, multiple_of=16), "here")
    assert remarks_on_shapes(checkpoint, [0.3], Method(**LIKE_HFPRUNE), "here") == []

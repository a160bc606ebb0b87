"""Shapes of mixtures of experts: the width of every MLP at a ratio, and the methods that can prune them."""

import math

import pytest
from headers import CONFIG, checkpoint_of, mixtures, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.checkpoints.pruned_config import is_plain, plain_group_counts, pruned_config
from hfprune_dist.checkpoints.token_costs import TokenCosts
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.expert_shapes import ALIGNED, ExpertTarget
from hfprune_dist.planning.ratios import check_ratios
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import EXPERT_NEURONS

LIKE_HFPRUNE = {"criterion": "entropy"}


def target(checkpoint, ratio, multiple_of=1):
    return ExpertTarget(ShapeTarget(checkpoint, ratio, ("neurons",), multiple_of, "here"))


def widths_of(checkpoint, shape):
    """Map each kind to the width that its layers' MLPs, or each of their experts, keep."""
    kinds = {kind: checkpoint.structures[kind] for kind in shape.units}
    for kind, units in kinds.items():
        assert [bool(count) for count in shape.units[kind]] == [bool(count) for count in units.counts]
    return {kind: {count // units.copies for count in shape.units[kind] if count} for kind, units in kinds.items()}


@given(mixtures(), st.floats(0.01, 0.95), st.sampled_from([1, 4, 32]))
def test_the_largest_shape_with_which_the_ratio_goes(config, ratio, multiple_of):
    checkpoint = checkpoint_of(config)
    asked, step = target(checkpoint, ratio, multiple_of), math.lcm(multiple_of, ALIGNED)
    if ratio > asked.largest():
        told = f"pruning neurons alone, of which .*: widths of experts are multiples of {step}; the largest possible is"
        with pytest.raises(UserError, match=told):
            asked.shape()
        return
    shape, experts = asked.shape(), checkpoint.structures[EXPERT_NEURONS].width
    assert checkpoint.parameter_counts.ratio(shape) >= ratio and is_plain(checkpoint, shape)
    widths = widths_of(checkpoint, shape)
    (width,) = widths[EXPERT_NEURONS]
    # Experts no wider than a step lose nothing; what the other MLPs lose may be enough.
    assert (width % step == 0 and width < experts) or width == experts <= step
    for kind, (kept,) in widths.items():
        whole = checkpoint.structures[kind].width
        assert kept <= max(whole * width / experts, min(multiple_of, whole))
    if width + step < experts:
        wider = asked._with(width + step)
        assert checkpoint.parameter_counts.ratio(wider) < ratio


@given(mixtures(), st.floats(0.01, 0.95), st.sampled_from([1, 2]))
def test_kv_groups_lose_the_share_of_neurons_that_is_nearest(config, ratio, split):
    checkpoint = checkpoint_of(config)
    both, possible = ("neurons", "kv_groups"), [it for it in plain_group_counts(checkpoint) if it % split == 0]
    asked = ExpertTarget(ShapeTarget(checkpoint, ratio, both, 1, "here", tensor_parallel=split))
    if ratio > asked.largest():
        with pytest.raises(UserError, match="the largest possible is"):
            asked.shape()
        return
    shape, experts = asked.shape(), checkpoint.structures[EXPERT_NEURONS]
    (groups,), (width,) = {*shape.units["kv_groups"]}, widths_of(checkpoint, shape)[EXPERT_NEURONS]
    wanted = possible[-1] * width / experts.width
    assert groups == min(possible, key=lambda it: (abs(it - wanted), it))
    assert checkpoint.parameter_counts.ratio(shape) >= ratio and is_plain(checkpoint, shape)
    stated = pruned_config(checkpoint, shape)
    assert (stated["num_key_value_heads"], stated["num_attention_heads"]) == (groups, 2 * groups)
    for neurons_alone in [target(checkpoint, ratio)] if ratio <= target(checkpoint, ratio).largest() else []:
        assert neurons_alone.shape().units[EXPERT_NEURONS] <= shape.units[EXPERT_NEURONS]


@pytest.mark.parametrize(("width", "groups"), [(64, 2), (56, 2), (48, 1), (8, 1)])
def test_halfway_between_two_numbers_of_kv_groups_it_is_the_smaller_one(checkpoint, width, groups):
    assert checkpoint.structures[EXPERT_NEURONS].width == 64
    assert ExpertTarget(ShapeTarget(checkpoint, 0.2, ("neurons", "kv_groups"), 1, "here"))._groups(width) == groups


@given(mixtures(), st.floats(0.05, 0.4), st.floats(1.0, 2.0))
def test_larger_ratios_lie_within_smaller_ones(config, ratio, factor):
    checkpoint = checkpoint_of(config)
    larger, smaller = target(checkpoint, ratio * factor), target(checkpoint, ratio)
    if larger.asked.ratio <= larger.largest():
        for kind, counts in larger.shape().units.items():
            assert all(pair[0] <= pair[1] for pair in zip(counts, smaller.shape().units[kind], strict=True))


@given(mixtures(), st.floats(0.05, 0.5))
def test_config_json_describes_what_is_left(config, ratio):
    checkpoint = checkpoint_of(config)
    asked = target(checkpoint, ratio)
    if ratio > asked.largest():
        return
    shape = asked.shape()
    smaller = pruned_config(checkpoint, shape)
    left = checkpoint_of({**smaller, "num_experts": config["num_experts"]})
    assert left.parameters == checkpoint.parameter_counts.of(shape)
    assert left.tensors.keys() == tensors_of(config).keys()


@given(mixtures())
def test_a_token_costs_what_its_experts_cost(config):
    """Compare with the same model that has only as many experts as a token is routed to."""
    every = {**config, "num_experts": config["num_experts_per_tok"]}
    if every["num_experts"] < 2:
        return
    costs, of_chosen = (TokenCosts.of(checkpoint_of(it)) for it in (config, every))
    layers = config["num_hidden_layers"] - config["first_k_dense_replace"]
    routing = layers * 64 * (config["num_experts"] - every["num_experts"])
    assert costs.parameters == checkpoint_of(config).parameters
    assert costs.active_parameters == of_chosen.parameters + routing
    assert costs.flops(10) == of_chosen.flops(10) + 2 * routing


@pytest.fixture(scope="module")
def checkpoint():
    layers = {"num_hidden_layers": 2, "intermediate_size": 64, "first_k_dense_replace": 0}
    return checkpoint_of({**CONFIG, **layers, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2})


@pytest.mark.parametrize("width", [1, 37, 60])
def test_experts_that_transformers_does_not_run_are_refused(width):
    layers = {"num_hidden_layers": 1, "intermediate_size": 64, "first_k_dense_replace": 0}
    sizes = {**layers, "moe_intermediate_size": width, "num_experts": 4, "num_experts_per_tok": 2}
    checkpoint = checkpoint_of({**CONFIG, **sizes})
    with pytest.raises(UserError, match=rf"here: its experts have {width} neurons, but .* multiples of 8"):
        check_ratios(checkpoint, [0.2], Method(**LIKE_HFPRUNE), "here")


def test_ratios_that_come_to_one_shape_are_told(checkpoint):
    method = Method(**LIKE_HFPRUNE)
    check_ratios(checkpoint, [0.1, 0.3], method, "here")
    told = r"ratios 0\.3 and 0\.301 would be the same checkpoint once widths of experts are rounded to multiples of "
    with pytest.raises(UserError, match=f"{told}8; leave one of them out$"):
        check_ratios(checkpoint, [0.3, 0.301], method, "here")
    with pytest.raises(UserError, match=f"{told}16; leave one of them out or use a smaller prune.multiple_of$"):
        check_ratios(checkpoint, [0.3, 0.301], Method(**LIKE_HFPRUNE, multiple_of=16), "here")


@pytest.mark.parametrize(("multiple_of", "step", "least"), [(1, 8, 8), (12, 24, 24), (50, 200, 64)])
def test_a_ratio_out_of_reach_is_told_with_the_width_that_stays(checkpoint, multiple_of, step, least):
    told = f"of which {least} of 64 in each expert must stay: widths of experts are multiples of {step}; the largest"
    setting = "" if multiple_of == 1 else rf" \(multiple_of {multiple_of}\)"
    with pytest.raises(UserError, match=rf"{told} possible is 0\.\d+{setting}$"):
        check_ratios(checkpoint, [0.95], Method(**LIKE_HFPRUNE, multiple_of=multiple_of), "here")

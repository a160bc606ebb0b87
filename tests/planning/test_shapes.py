"""Shapes at a ratio, against all that are possible, models that transformers makes of them, and formulas of papers."""

import math
import re
from dataclasses import replace

import pytest
import torch
from blank import LLAMA_7B, SMOLLM2, blank, parameters_of, sizes
from families import FAMILIES, save_model
from headers import checkpoint_of, grouped_mixtures, mixtures
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import VARIANTS
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.pruned_config import is_plain, plain_group_counts, pruned_config
from hfprune_dist.checkpoints.token_costs import token_costs
from hfprune_dist.errors import UserError
from hfprune_dist.planning.shapes import (
    ALIGNED,
    MOST_SHAPES,
    shape_for,
    shapes_for,
    with_layers,
)
from hfprune_dist.planning.target import Target
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS
from hfprune_dist.structures.kept import Shape

NEURONS, BOTH, ALL = ("neurons",), ("neurons", "kv_groups"), ("neurons", "kv_groups", "layers")
STRUCTURES = {
    "uniform": [NEURONS],
    "local": [NEURONS, BOTH],
    "plain": [BOTH, ALL, ALL[::2]],
    "global": [NEURONS, BOTH],
    "searched": [NEURONS, BOTH, ALL, ALL[::2]],
}


@st.composite
def targets(draw, *allocations, protects=True):
    """Draw the architecture, its sizes, and what is asked of it."""
    variant, changes = draw(st.sampled_from(sorted(VARIANTS))), draw(sizes())
    allocation = draw(st.sampled_from(allocations or list(STRUCTURES)))
    structures = draw(st.sampled_from(STRUCTURES[allocation]))
    first, last = draw(st.tuples(*[st.integers(0, 2)] * 2)) if protects and allocation != "plain" else (0, 0)
    return (
        variant,
        changes,
        Target(
            blank(variant, **changes),
            draw(st.floats(0.001, 0.95)),
            "m",
            structures,
            allocation,
            draw(st.sampled_from([1, 1, 2, 8, 32])),
            draw(st.sampled_from([1, 1, 1, 2, 3])) if "kv_groups" in structures else 1,
            draw(st.sampled_from([0.0, 0.2, 0.5])) if allocation in ("global", "searched") else 0.0,
            *((first, last) if allocation in ("local", "global", "searched") else (0, 0)),
        ),
    )


def shapes_or_nothing(target):
    try:
        return shapes_for(target)
    except UserError:
        assume(False)


def smaller(target, variant, changes, shape):
    """Return the parameters of transformers' model of a plain shape."""
    (width,), (groups,) = ({*shape.units[kind]} for kind in BOTH)
    queries = changes["num_attention_heads"] // changes["num_key_value_heads"]
    heads = {"num_key_value_heads": groups, "num_attention_heads": queries * groups}
    less = changes | heads | {"num_hidden_layers": len(shape.layers), "intermediate_size": width}
    if less["hidden_size"] % less["num_attention_heads"] and variant == "llama":
        variant = "mistral"  # which is written then
    return parameters_of(variant, **less, head_dim=target.dense.family.completed(target.dense.config)["head_dim"])


@settings(max_examples=20)
@given(targets("uniform", "local"))
def test_layers_that_are_not_protected_are_alike_and_come_as_close_as_widths_can(drawn):
    variant, changes, target = drawn
    (shape,) = shapes_or_nothing(target)
    dense = changes["intermediate_size"], changes["num_key_value_heads"]
    each = list(zip(*(shape.units[kind] for kind in BOTH), strict=True))
    pruned = target.pruned_layers
    ((width, groups),) = {each[layer] for layer in pruned}
    assert {size for layer, size in enumerate(each) if layer not in pruned} <= {dense}
    assert width == dense[0] or width % target.multiple_of == 0 < width < dense[0]
    assert groups % target.tensor_parallel == 0 if "kv_groups" in target.structures else groups == dense[1]
    units = target.counts.units

    def removed(width, groups):
        return len(pruned) * (units["neurons"] * (dense[0] - width) + units["kv_groups"] * (dense[1] - groups))

    assert target.counts.total - target.counts.after(shape) == removed(width, groups)
    widths = {*range(target.multiple_of, dense[0], target.multiple_of), dense[0]}
    closest = min(abs(gone - target.removals) for other in widths if (gone := removed(other, groups)))
    assert abs(removed(width, groups) - target.removals) == pytest.approx(closest, abs=1e-3)
    share = 1 - target.removals / removed(0, 0)
    for other in plain_group_counts(target.dense) if len(pruned) == len(each) and len(target.structures) == 2 else []:
        nearer = abs(other / dense[1] - share) < abs(groups / dense[1] - share) - 1e-9
        if other % target.tensor_parallel == 0 and nearer:
            assert not removed(dense[0], other) <= target.removals <= removed(min(widths), other)
    if len(pruned) == len(each):
        assert is_plain(target.dense, shape) and target.counts.after(shape) == smaller(target, variant, changes, shape)


@settings(max_examples=15)
@given(targets("plain"), st.randoms())
def test_plain_shapes_come_as_close_to_the_ratio_as_widths_can(drawn, random):
    variant, changes, target = drawn
    shapes = shapes_or_nothing(target)
    dense = changes["num_hidden_layers"], changes["num_key_value_heads"], changes["intermediate_size"]
    found = [(len(one.layers), one.units["kv_groups"][0], one.units["neurons"][0]) for one in shapes]
    assert 0 < len(found) <= MOST_SHAPES and found == sorted(set(found), reverse=True) and dense not in found
    for shape, (layers, groups, width) in zip(shapes, found, strict=True):
        assert width % target.multiple_of == 0 and width <= dense[2] and is_plain(target.dense, shape)
        assert dense[1] / 4 <= groups <= dense[1] and groups % target.tensor_parallel == 0
        assert dense[0] * 2 / 3 <= layers <= dense[0]
        assert layers == dense[0] or "layers" in target.structures
        assert groups == dense[1] or "kv_groups" in target.structures
        step, beyond = target.counts.units["neurons"] * layers * target.multiple_of, 1e-6 * target.counts.total
        missing = target.counts.total - target.counts.after(shape) - target.removals
        if target.multiple_of == 1:
            assert abs(missing) <= step / 2 + beyond
        else:
            assert -beyond <= missing < step + beyond, "at least the ratio"
        assert with_layers(target, shape.layers, groups) == shape
    shape = random.choice(shapes)
    assert target.counts.after(shape) == smaller(target, variant, changes, shape)


@settings(max_examples=120)
@given(targets("uniform", "local", "plain", "global", "searched"))
def test_what_a_message_calls_possible_is_possible(drawn):
    target = drawn[2]
    try:
        shapes_for(target)
    except UserError as error:
        told = re.search(
            r"nearest possible is ([\d.e-]+)$|; (nothing can go|the largest that does is \d+)$", str(error)
        )
        if told[1]:
            shapes_for(replace(target, ratio=float(told[1])))
        else:
            few = not target.pruned_layers or target.multiple_of >= target.neurons.most or target.neurons.most < 3
            assert few or target.floor or target.tensor_parallel > 1


@settings(max_examples=20)
@given(targets("global", "searched"))
def test_where_layers_compete_bounds_hold_and_the_ratio_is_within_them(drawn):
    _, changes, target = drawn
    shapes_or_nothing(target)
    layers, pruned = changes["num_hidden_layers"], target.pruned_layers
    for layer, (width, groups) in enumerate(zip(*map(target.fewest, BOTH), strict=True)):
        whole = changes["intermediate_size"], changes["num_key_value_heads"]
        least = max(1, round(target.floor * whole[0]))
        assert (width, groups) == whole or layer in pruned
        assert width == whole[0] or (width % target.multiple_of == 0 and least <= width < least + target.multiple_of)
        assert groups == whole[1] or (groups == target.tensor_parallel and "kv_groups" in target.structures)
    assert {*target.droppable} <= {*pruned} and bool(target.droppable) <= ("layers" in target.structures)
    assert target.fewest_layers >= 2 * layers / 3
    gone = {*target.droppable[: layers - target.fewest_layers]}
    kept = tuple(layer for layer in range(layers) if layer not in gone)
    least = {kind: tuple(target.fewest(kind)[layer] for layer in kept) for kind in BOTH}
    assert target.ratio <= target.counts.ratio(Shape(kept, least))
    tried = range(0, target.most_layers_gone() + 1, target.step_of_layers)
    assert all(gone * target.counts.layers[0] <= target.removals for gone in [*tried][:-1])


def smol(ratio, allocation="uniform", structures=NEURONS, **options):
    return Target(blank(**SMOLLM2), ratio, "m", structures, allocation, **options)


def test_of_too_many_shapes_some_of_each_kind_stay():
    many = SMOLLM2 | {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 512, "num_hidden_layers": 22}
    shapes = shapes_for(Target(blank(**many), 0.5, "m", ALL, "plain"))
    assert len(shapes) == MOST_SHAPES and {shape.units["kv_groups"][0] for shape in shapes} == {8, 6, 4, 2}


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (smol(0.7), "0.7 can't be reached by pruning neurons; the nearest possible is 0.5915[0-9]*"),
        (smol(0.01, "plain", ALL, tensor_parallel=2), "with tensor_parallel 2; the nearest possible is 0.065772"),
        (
            smol(0.2, "local", BOTH, tensor_parallel=2, protect_first=1),
            "with tensor_parallel 2, .*; the largest that does is 3",
        ),
        (smol(0.2, multiple_of=2048), "with multiple_of 2048; nothing can go"),
        (smol(0.9, "searched", ALL, floor=0.5), "layers with floor 0.5; the nearest possible is 0.548188"),
    ],
)
def test_what_can_not_be_is_one_message(target, told):
    with pytest.raises(UserError, match=f"^m: .*{told}$"):
        shapes_for(target)


def test_layers_that_differ_lose_the_same_share_each():
    rows = {"intermediate_size": [40, 48, 20], "num_attention_heads": [8, 4, 8], "num_key_value_heads": [4, 2, 4]}
    changes = {field: max(row) for field, row in rows.items()} | {"num_hidden_layers": 3, "layer_sizes": rows}
    shape = shape_for(Target(blank(**changes), 0.2, "m", BOTH, "local"))
    assert shape.units["kv_groups"] in ((3, 2, 3), (2, 1, 2))
    left = [kept / dense for kept, dense in zip(shape.units["neurons"], rows["intermediate_size"], strict=True)]
    assert max(left) - min(left) < 1.1 / 20 and max(left) < 1


def test_where_layers_differ_in_size_widths_make_up_for_those_that_go(tmp_path):
    kinds = FAMILIES["gemma4_text"]["layer_types"]
    changes = {"num_hidden_layers": 6, "layer_types": [*(kinds[layer % 2] for layer in range(5)), "full_attention"]}
    checkpoint = open_checkpoint(save_model(tmp_path / "model", "gemma4_text", intermediate_size=40, **changes))
    target = Target(checkpoint, 0.3, "m", ALL[::2], "plain")
    assert len(set(target.counts.layers)) > 1
    for gone in target.droppable:
        shape = with_layers(target, [layer for layer in range(6) if layer != gone], target.groups.most)
        assert abs(target.counts.ratio(shape) - 0.3) * target.counts.total <= 3 * target.counts.units["neurons"] + 1


# Low rank.


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_without_grouped_queries_ranks_are_those_of_the_release(keep):
    checkpoint = blank(**LLAMA_7B)
    layers = (info.shape for name, info in checkpoint.tensors.items() if ".layers." in name)
    whole = sum(math.prod(shape) for shape in layers if len(shape) == 2)
    shape = shape_for(Target(checkpoint, (1 - keep) * whole / checkpoint.parameters, "m", NEURONS, "low_rank"))
    found = {name.split(".")[-1]: row[0] for name, row in shape.ranks.items()}
    hidden, split = 4096, 3
    k_att = int(keep * hidden / 2)
    k_vo = int(k_att * 2 * split / (1 + split))
    if k_vo >= hidden / 2:
        k_qk = int(keep * hidden) - hidden // 2
        assert found == {"q_proj": pytest.approx(k_qk, abs=1), "k_proj": found["q_proj"]}
    else:
        k_qk = int(k_att * 2 / (1 + split))
        expected = {"q_proj": k_qk, "k_proj": k_qk, "v_proj": k_vo, "o_proj": k_vo}
        assert found == {name: pytest.approx(rank, abs=2) for name, rank in expected.items()}
    assert shape.units["neurons"][0] == pytest.approx(keep * 11008, abs=3)


# Mixtures of experts.


@settings(max_examples=60)
@given(mixtures(), st.floats(0.01, 0.95), st.sampled_from([1, 4, 32]), st.sampled_from([NEURONS, BOTH]))
def test_experts_are_as_wide_as_the_ratio_lets_them_be(config, ratio, multiple_of, structures):
    checkpoint, step = checkpoint_of(config), math.lcm(multiple_of, ALIGNED)
    (shape,) = shapes_or_nothing(Target(checkpoint, ratio, "m", structures, "local", multiple_of))
    assert checkpoint.parameter_counts.ratio(shape) >= ratio and is_plain(checkpoint, shape)
    experts = checkpoint.structures[EXPERT_NEURONS]
    copies = {kind: checkpoint.structures[kind].copies for kind in shape.units}
    widths = {kind: {count // copies[kind] for count in row if count} for kind, row in shape.units.items()}
    (width,) = widths[EXPERT_NEURONS]
    # Experts no wider than a step lose nothing; what the other MLPs lose may be enough.
    assert (width % step == 0 and width < experts.width) or width == experts.width <= step
    for kind in widths.keys() - {"kv_groups"}:
        whole, (kept,) = checkpoint.structures[kind].width, widths[kind]
        assert kept <= max(whole * width / experts.width, min(multiple_of, whole))
    if structures == BOTH:
        possible = plain_group_counts(checkpoint)
        wanted = possible[-1] * width / experts.width
        assert widths["kv_groups"] == {min(possible, key=lambda count: (abs(count - wanted), count))}
        return
    left = checkpoint_of({**pruned_config(checkpoint, shape), "num_experts": config["num_experts"]})
    assert left.parameters == checkpoint.parameter_counts.after(shape)


@settings(max_examples=10)
@given(mixtures())
def test_devices_that_no_number_of_groups_suits_narrow_no_experts(config):
    checkpoint = checkpoint_of(config)
    devices = 2 * config["num_key_value_heads"]
    with pytest.raises(UserError, match=f"tensor_parallel {devices} doesn't divide"):
        shapes_for(Target(checkpoint, 0.2, "m", BOTH, "local", 8, tensor_parallel=devices))


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


@settings(max_examples=60)
@given(grouped_mixtures(), st.floats(0.01, 0.95), st.sampled_from([1, 2, 4]))
def test_as_many_experts_stay_as_the_ratio_and_the_router_let(config, ratio, multiple_of):
    checkpoint, every = checkpoint_of(config), config["num_experts"]
    possible = [number for number in range(multiple_of, every, multiple_of) if suffices(config, number)]
    there = checkpoint.structures[EXPERTS].counts

    def shape_with(number):
        return Shape(tuple(range(len(there))), {EXPERTS: tuple(number if count else 0 for count in there)})

    enough = [number for number in possible if checkpoint.parameter_counts.ratio(shape_with(number)) >= ratio]
    target = Target(checkpoint, ratio, "m", (EXPERTS,), "uniform", multiple_of)
    if not enough:
        with pytest.raises(UserError, match=r"by pruning experts.*; (the nearest possible|nothing can go)"):
            shapes_for(target)
        return
    shape = shape_for(target)
    assert shape == shape_with(max(enough)) and is_plain(checkpoint, shape)
    left = checkpoint_of(pruned_config(checkpoint, shape))
    assert left.parameters == checkpoint.parameter_counts.after(shape)
    routers = (1 + ("n_group" in config) / 64) * (every - max(enough)) * len(left.family.experts.layers)
    assert token_costs(left).active_parameters == token_costs(checkpoint).active_parameters - 64 * routers

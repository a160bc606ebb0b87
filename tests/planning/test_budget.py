"""Budgets of shapes in which everything competes, checked against the smallest models that they allow."""

from dataclasses import replace

import pytest
import torch
from blank import SMOLLM2, blank, parameters_of, sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from masking import write
from tiny import VARIANTS, save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import Budget, budget_of, largest_ratio
from hfprune_dist.planning.plain_shapes import step_of_layers
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures.kept import Kept, Shape

ALL = ("neurons", "kv_groups", "layers")
STRUCTURES = [ALL, ALL[:2], ALL[::2], ALL[:1]]
LIMITS = (0.2, 0, 0)


def target(checkpoint, ratio, structures=ALL, multiple_of=1, tensor_parallel=1):
    return ShapeTarget(checkpoint, ratio, structures, multiple_of, "m", tensor_parallel)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(data=st.data(), variant=st.sampled_from(sorted(VARIANTS)), changes=sizes(), ratio=st.floats(0.001, 0.9))
def test_a_budget_is_what_its_bounds_leave(data, variant, changes, ratio):
    layers, groups = changes["num_hidden_layers"], changes["num_key_value_heads"]
    split = data.draw(st.sampled_from([size for size in range(1, groups + 1) if groups % size == 0]))
    structures, multiple_of = data.draw(st.sampled_from(STRUCTURES)), data.draw(st.sampled_from([1, 2, 8]))
    asked = target(blank(variant, **changes), ratio, structures, multiple_of, split)
    limits = data.draw(st.tuples(st.sampled_from([0.05, 0.2, 1.0]), st.integers(0, 2), st.integers(0, 2)))
    try:
        budget = budget_of(asked, limits)
    except UserError as error:
        out_of_reach = ratio > largest_ratio(asked, limits)
        assert out_of_reach or "removes nothing" in str(error) or "comes to ratio" in str(error)
        return
    unit = asked.counts.units["neurons"] if structures == ("neurons",) else 1  # of neurons alone, whole ones go
    assert abs(budget.parameters - ratio * asked.counts.total) <= unit / 2 and budget.parameters % unit == 0
    _, first, last = limits
    protected = {*range(first), *range(layers - last, layers)} & set(range(layers))
    for layer in range(layers):
        width, least = budget.least["neurons"][layer], budget.least["kv_groups"][layer]
        assert width == changes["intermediate_size"] or (width % multiple_of == 0 and layer not in protected)
        assert least == groups or (least == split and "kv_groups" in structures and layer not in protected)
    assert not protected & set(budget.droppable) and budget.fewest_layers >= 2 * layers / 3
    assert bool(budget.droppable) <= ("layers" in structures)


@settings(derandomize=True, deadline=None)
@given(data=st.data(), of_layers=st.lists(st.integers(5, 9), min_size=1, max_size=40), parameters=st.integers(-5, 150))
def test_no_more_layers_may_go_than_the_budget_allows_and_one_number_beyond(data, of_layers, parameters):
    droppable = data.draw(st.sets(st.sampled_from(range(len(of_layers)))))
    fewest = data.draw(st.integers(1, len(of_layers)))
    gone = Budget(parameters, {}, tuple(sorted(droppable)), fewest).most_layers_gone(of_layers)
    bound, step = min(len(droppable), len(of_layers) - fewest), step_of_layers(len(of_layers))
    smallest = sorted(of_layers[layer] for layer in droppable)
    within = [number for number in range(0, bound + 1, step) if sum(smallest[:number]) <= parameters]
    assert gone <= bound and max(within, default=0) <= gone
    assert gone == bound or gone == (within[-1] + step if within else 0)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(variant=st.sampled_from(sorted(VARIANTS)), changes=sizes(), structures=st.sampled_from(STRUCTURES))
def test_the_largest_ratio_is_that_of_the_smallest_model(variant, changes, structures):
    asked = target(blank(variant, **changes), 0.5, structures)
    queries = changes["num_attention_heads"] // changes["num_key_value_heads"]
    smallest = changes | {"intermediate_size": max(1, round(0.2 * changes["intermediate_size"]))}
    smallest["head_dim"] = asked.groups.implied["head_dim"]
    if "kv_groups" in structures:
        smallest |= {"num_key_value_heads": 1, "num_attention_heads": queries}
    if "layers" in structures:
        smallest["num_hidden_layers"] = -(-2 * changes["num_hidden_layers"] // 3)
    assume(variant != "llama" or smallest["hidden_size"] % smallest["num_attention_heads"] == 0)
    total = parameters_of(variant, **changes)
    assert largest_ratio(asked, LIMITS) == pytest.approx(1 - parameters_of(variant, **smallest) / total, abs=1e-12)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    layers=st.integers(2, 40),
    width=st.integers(4, 60),
    multiple_of=st.sampled_from([1, 4]),
    structures=st.sampled_from([ALL, ALL[::2]]),
    floor=st.sampled_from([0.3, 0.7, 0.9, 1.0]),
    first=st.integers(0, 3),
    ratio=st.floats(0.01, 0.6),
)
def test_a_ratio_between_shapes_with_more_and_with_fewer_layers_is_refused(
    layers, width, multiple_of, structures, floor, first, ratio
):
    """Removals range from those of the layers that go to those of all units that may go, too."""
    sizes = {"num_hidden_layers": layers, "intermediate_size": width, "num_key_value_heads": 2}
    checkpoint = blank("mistral", **sizes, num_attention_heads=4, hidden_size=32, vocab_size=64)
    asked, limits = target(checkpoint, ratio, structures, multiple_of), (floor, first, 0)
    assume(first < layers and ratio <= largest_ratio(asked, limits))
    counts, most = asked.counts, min(layers - first, layers - asked.fewest_layers)
    least = min(-(-round(floor * width) // multiple_of) * multiple_of, width)
    units = counts.units["neurons"] * (width - least) + counts.units["kv_groups"] * ("kv_groups" in structures)
    step, slack = max(1, round(layers / 15)), counts.units["neurons"] * multiple_of / 2
    spans = [
        (gone * counts.layers[0] - slack, gone * counts.layers[0] + (layers - first - gone) * units)
        for gone in sorted({*range(0, most + 1, step), most})
    ]
    wanted = round(ratio * counts.total)
    assume(2 * wanted >= multiple_of * counts.units["neurons"])
    if any(low <= wanted <= high for low, high in spans):
        assert budget_of(asked, limits).parameters == wanted
        return
    larger = min(low + slack for low, _ in spans if low > wanted) / counts.total
    with pytest.raises(UserError, match=rf"comes to ratio {ratio:g} with the floors .* is {int(larger * 1e6) / 1e6:g}"):
        budget_of(asked, limits)
    budget_of(replace(asked, ratio=int(larger * 1e6) / 1e6), limits)


def test_of_a_model_whose_layers_differ_the_largest_ratio_is_reached_whichever_layers_go(tmp_path):
    dense = open_checkpoint(save_tiny(tmp_path / "dense", num_hidden_layers=4))
    units = {"neurons": [torch.arange(count) for count in (48, 9, 30, 20)]}
    units["kv_groups"] = [torch.arange(count) for count in (2, 1, 1, 2)]
    write(dense, Kept.of_all_layers(units), tmp_path / "again")
    asked = target(open_checkpoint(tmp_path / "again"), 0.2)
    budget = budget_of(asked, (0.5, 0, 1))
    assert budget.least == {"neurons": (24, 4, 15, 20), "kv_groups": (1, 1, 1, 2)}
    assert budget.droppable == (0, 1, 2) and budget.fewest_layers == 3
    reached = []
    for gone in budget.droppable:
        layers = tuple(layer for layer in range(4) if layer != gone)
        least = {kind: tuple(it[layer] for layer in layers) for kind, it in budget.least.items()}
        reached.append(asked.counts.ratio(Shape(layers, least)))
    assert len(set(reached)) == 3 and largest_ratio(asked, (0.5, 0, 1)) == min(reached)
    with pytest.raises(UserError, match=r"tensor_parallel 2 divides no .* that works is 1"):
        budget_of(target(asked.checkpoint, 0.2, tensor_parallel=2), LIMITS)


@pytest.mark.parametrize(
    ("asked", "limits", "message"),
    [
        (
            {"ratio": 0.9, "structures": ALL[:2]},
            LIMITS,
            r"m: ratio 0.9 can't be reached by pruning neurons and kv_groups with the floors that prune.floor, "
            r"protect_first and protect_last set; the largest possible is 0.6051; with layers in "
            r"prune.structures 0.6666$",
        ),
        (
            {"ratio": 0.5, "structures": ALL},
            (0.5, 10, 10),
            r"kv_groups and layers .* is 0.2631$",
        ),
        ({"ratio": 0.65, "tensor_parallel": 3, "multiple_of": 64}, LIMITS, r"\(multiple_of 64, tensor_parallel 3\)$"),
        ({"ratio": 0.2, "tensor_parallel": 2}, LIMITS, r"tensor_parallel 2 divides no .* that works is 3"),
        ({"ratio": 1e-6, "multiple_of": 64}, LIMITS, r"removes nothing once units are rounded \(multiple_of 64\)"),
    ],
)
def test_what_can_not_be_is_one_message(asked, limits, message):
    with pytest.raises(UserError, match=message):
        budget_of(target(blank(**SMOLLM2), **asked), limits)


def test_half_of_smollm2_is_within_its_bounds():
    budget = budget_of(target(blank(**SMOLLM2), 0.5), LIMITS)
    assert budget.parameters == round(0.5 * 134_515_008) and budget.fewest_layers == 20
    assert set(budget.least["kv_groups"]) == {1} and len(budget.droppable) == 30

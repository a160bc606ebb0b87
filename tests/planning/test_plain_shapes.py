"""The plain shapes to choose from, against the models that transformers makes of them."""

import itertools
import re
from dataclasses import replace

import pytest
from blank import SMOLLM2, blank, parameters_of, sizes
from families import FAMILIES, save_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import VARIANTS

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.pruned_config import is_plain
from hfprune_dist.errors import UserError
from hfprune_dist.planning.plain_shapes import (
    MOST_SHAPES,
    PlainShape,
    all_plain_shapes,
    fitted_to_layers,
    plain_shapes,
    ratio_of,
    shape_of,
)
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.shapes import uniform_shape
from hfprune_dist.planning.widths import OutOfReachError

ALL = ("neurons", "kv_groups", "layers")
STRUCTURES = [ALL, ALL[:2], ALL[::2]]


def target(checkpoint, ratio, structures=ALL, multiple_of=1, tensor_parallel=1):
    return ShapeTarget(checkpoint, ratio, structures, multiple_of, "m", tensor_parallel)


@st.composite
def targets(draw):
    variant, changes = draw(st.sampled_from(sorted(VARIANTS))), draw(sizes())
    asked = target(
        blank(variant, **changes),
        draw(st.floats(0.001, 0.95)),
        draw(st.sampled_from(STRUCTURES)),
        draw(st.sampled_from([1, 1, 2, 8, 32])),
        draw(st.sampled_from([1, 1, 1, 2, 3])),
    )
    return variant, changes, asked


def shapes_or_nothing(asked):
    try:
        return plain_shapes(asked)
    except UserError:
        assume(False)


def uniform_width(asked):
    try:
        return uniform_shape(asked).units["neurons"][0]
    except UserError:
        return None


@settings(derandomize=True, deadline=None, max_examples=40)
@given(targets(), st.randoms())
def test_shapes_come_as_close_to_the_ratio_as_widths_can(drawn, random):
    variant, changes, asked = drawn
    shapes = shapes_or_nothing(asked)
    dense = PlainShape(changes["num_hidden_layers"], changes["num_key_value_heads"], changes["intermediate_size"])
    assert 0 < len(shapes) <= MOST_SHAPES and shapes == sorted(set(shapes), reverse=True)
    assert dense not in shapes
    for shape in shapes:
        assert shape.width % asked.multiple_of == 0 and asked.multiple_of <= shape.width <= dense.width
        assert shape.kv_groups % asked.tensor_parallel == 0 or "kv_groups" not in asked.structures
        assert dense.kv_groups / 4 <= shape.kv_groups <= dense.kv_groups
        assert dense.num_layers * 2 / 3 <= shape.num_layers <= dense.num_layers
        assert shape.num_layers == dense.num_layers or "layers" in asked.structures
        assert shape.kv_groups == dense.kv_groups or "kv_groups" in asked.structures
        assert is_plain(asked.checkpoint, shape_of(asked, shape))
        step = asked.counts.units["neurons"] * shape.num_layers * asked.multiple_of / asked.counts.total
        missing = ratio_of(asked, shape) - asked.ratio
        if asked.multiple_of == 1:
            assert abs(missing) <= step / 2 * (1 + 1e-9)
        else:
            assert -1e-12 <= missing < step * (1 + 1e-9), "at least the ratio"
    shape = random.choice(shapes)
    smaller = changes | {
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.kv_groups,
        "num_attention_heads": changes["num_attention_heads"] // changes["num_key_value_heads"] * shape.kv_groups,
        "intermediate_size": shape.width,
        "head_dim": asked.groups.implied["head_dim"],
    }
    if smaller["hidden_size"] % smaller["num_attention_heads"] and variant == "llama":
        variant = "mistral"  # which is written then
    assert asked.counts.of(shape_of(asked, shape)) == parameters_of(variant, **smaller)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(targets())
def test_the_first_is_todays_uniform_width_where_that_reaches_the_ratio(drawn):
    _, changes, asked = drawn
    assume(asked.multiple_of == 1)
    assume("kv_groups" not in asked.structures or changes["num_key_value_heads"] % asked.tensor_parallel == 0)
    width = uniform_width(asked)
    layers, groups = changes["num_hidden_layers"], changes["num_key_value_heads"]
    try:
        first = plain_shapes(asked)[0]
    except UserError:
        assert width is None
        return
    assert (first == PlainShape(layers, groups, first.width)) == (width is not None)
    assert width is None or first.width == width


@settings(derandomize=True, deadline=None, max_examples=40)
@given(targets())
def test_what_a_message_calls_possible_is_possible(drawn):
    asked = drawn[2]
    try:
        assert plain_shapes(asked)
    except UserError as error:
        told = re.search(r"possible is ([\d.e-]+)|that works is (\d+)", str(error))
        if told[2] is not None:
            assert int(told[2]) <= asked.groups.most
            all_plain_shapes(replace(asked, tensor_parallel=int(told[2])))
        else:
            assert not all_plain_shapes(asked)
            assert float(told[1]) == 0 or plain_shapes(replace(asked, ratio=float(told[1])))


def test_half_of_smollm2():
    asked = target(blank(**SMOLLM2), 0.5)
    shapes = plain_shapes(asked)
    assert shapes[0] == PlainShape(30, 3, 239)
    assert {(30, 2, 409), (28, 3, 292), (28, 2, 463)} < {(it.num_layers, it.kv_groups, it.width) for it in shapes}
    assert shapes == all_plain_shapes(asked) and len(shapes) == 18
    assert {it.num_layers for it in shapes} == {30, 28, 26, 24, 22, 20}


def test_a_small_ratio_leaves_few_shapes_to_choose_from():
    shapes = plain_shapes(target(blank(**SMOLLM2), 0.1))
    assert shapes[0] == PlainShape(30, 3, 1277)
    assert all(it.width <= 1536 for it in shapes) and len(shapes) < 6


def test_many_shapes_are_thinned():
    many = SMOLLM2 | {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 512, "num_hidden_layers": 22}
    asked = target(blank(**many), 0.5)
    shapes, every = plain_shapes(asked), all_plain_shapes(asked)
    assert len(shapes) == MOST_SHAPES < len(every) and {every[0], every[-1]} <= set(shapes) < set(every)


def test_many_groups_are_thinned():
    many = SMOLLM2 | {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 512}
    shapes = plain_shapes(target(blank(**many), 0.4))
    assert {it.kv_groups for it in shapes} == {8, 6, 4, 2} and len(shapes) <= MOST_SHAPES
    split = plain_shapes(target(blank(**many), 0.4, tensor_parallel=4))
    assert {it.kv_groups for it in split} == {8, 4}


def test_layers_that_must_stay_stay():
    marked = blank("qwen3", **SMOLLM2, head_dim=64)
    marked.config["num_kv_shared_layers"] = 2
    assert {it.num_layers for it in plain_shapes(target(marked, 0.4))} == {30}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"ratio": 0.9, "structures": ALL[:2]},
            r"m: ratio 0.9 can't be reached by pruning neurons and kv_groups; the largest possible is 0.7231; "
            r"with layers in prune.structures 0.7452",
        ),
        ({"ratio": 0.9}, r"pruning neurons, kv_groups and layers; the largest possible is 0.7452$"),
        ({"ratio": 0.7, "tensor_parallel": 3, "structures": ALL[:2]}, r"is 0.5915 \(tensor_parallel 3\)"),
        (
            {"ratio": 0.2, "tensor_parallel": 4},
            r"tensor_parallel 4 divides no .* its 3 .*; the largest .* works is 3",
        ),
        (
            {"ratio": 0.01, "tensor_parallel": 2},
            r"comes to ratio 0.01; the next larger .* possible is 0.065772 ",
        ),
        ({"ratio": 1e-6}, r"comes to ratio 1e-06; the next larger one that is possible is 0.000385$"),
        ({"ratio": 0.2, "multiple_of": 2048}, r"the largest possible is 0.0000 \(multiple_of 2048\)"),
    ],
)
def test_what_can_not_be_is_one_message(asked, message):
    with pytest.raises(UserError, match=message):
        plain_shapes(target(blank(**SMOLLM2), **asked))


def test_the_next_larger_ratio_is_that_of_a_shape():
    """Where the only multiple is the whole width, no shape lacks neurons alone."""
    asked = target(blank(head_dim=32, intermediate_size=48), 0.01, ALL[:2], multiple_of=48)
    (smallest,) = plain_shapes(replace(asked, ratio=0.24))
    with pytest.raises(UserError, match="next larger") as told:
        plain_shapes(asked)
    named = re.search(r"possible is ([\d.]+) ", str(told.value))
    assert float(named[1]) == pytest.approx(ratio_of(asked, smallest), abs=1e-6)


@pytest.mark.parametrize("multiple_of", [1, 4])
@pytest.mark.parametrize("structures", [ALL, ALL[::2]])
@pytest.mark.parametrize("model_type", ["gemma4_text", "lfm3", "qwen3_5_text"])
def test_where_layers_differ_in_size_the_largest_ratio_is_reached_whichever_layers_go(
    tmp_path, model_type, structures, multiple_of
):
    kinds = FAMILIES[model_type]["layer_types"]
    changes = {"num_hidden_layers": 6, "layer_types": [*(kinds[it % 2] for it in range(5)), "full_attention"]}
    checkpoint = open_checkpoint(save_model(tmp_path / "model", model_type, intermediate_size=40, **changes))
    asked = target(checkpoint, 0.99, structures, multiple_of)
    assert len(set(asked.counts.layers)) > 1
    with pytest.raises(OutOfReachError) as told:
        plain_shapes(asked)
    largest = told.value.largest
    with pytest.raises(OutOfReachError):
        plain_shapes(replace(asked, ratio=largest + 1e-4))
    asked = replace(asked, ratio=largest)
    planned = plain_shapes(asked)
    most_gone = 6 - min(shape.num_layers for shape in planned)
    step = multiple_of * asked.counts.units["neurons"] / asked.counts.total
    for order in itertools.permutations({*range(6)} - asked.undroppable, most_gone):
        left = [[layer for layer in range(6) if layer not in order[: 6 - it.num_layers]] for it in planned]
        fitted = [(fitted_to_layers(asked, *those), those[1]) for those in zip(planned, left, strict=True)]
        reached = [ratio_of(asked, shape, layers) for shape, layers in fitted if shape is not None]
        assert reached and all(abs(it - largest) <= 6 * step for it in reached)
        assert multiple_of == 1 or min(reached) >= largest

"""Shapes whose layers lose the same share, against all possible ones, and models that transformers makes of them."""

import re
from dataclasses import replace

import pytest
from blank import SMOLLM2, blank, parameters_of, sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import VARIANTS

from hfprune_dist.checkpoints.pruned_config import is_plain
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.ratios import check_ratios
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.shapes import uniform_shape
from hfprune_dist.structures.kept import Shape

NEURONS, BOTH = ("neurons",), ("neurons", "kv_groups")


def target(checkpoint, ratio, structures=BOTH, multiple_of=1, split=1, protects=(0, 0)):
    return LocalTarget(ShapeTarget(checkpoint, ratio, structures, multiple_of, "m", split, BOTH), *protects)


@st.composite
def targets(draw, most_protected=2):
    variant, changes = draw(st.sampled_from(sorted(VARIANTS))), draw(sizes())
    asked = target(
        blank(variant, **changes),
        draw(st.floats(0.001, 0.9)),
        draw(st.sampled_from([BOTH, BOTH, NEURONS])),
        draw(st.sampled_from([1, 1, 2, 8, 32])),
        draw(st.sampled_from([1, 1, 1, 2, 3])),
        (draw(st.integers(0, most_protected)), draw(st.integers(0, most_protected))),
    )
    return variant, changes, asked


def shape_or_nothing(asked):
    try:
        return asked.shape()
    except UserError:
        assume(False)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(targets())
def test_layers_that_are_not_protected_are_alike_and_come_as_close_as_widths_can(drawn):
    _, changes, asked = drawn
    shape = shape_or_nothing(asked)
    layers, multiple_of, split = changes["num_hidden_layers"], asked.asked.multiple_of, asked.asked.tensor_parallel
    dense = changes["intermediate_size"], changes["num_key_value_heads"]
    each = list(zip(shape.units["neurons"], shape.units["kv_groups"], strict=True))
    last = layers - asked.protect_last
    assert each[: asked.protect_first] + each[last:] == [dense] * (asked.protect_first + asked.protect_last)
    ((width, groups),) = set(each[asked.protect_first : last])
    assert 0 < width <= dense[0] and (width == dense[0] or width % multiple_of == 0)
    goes = "kv_groups" in asked.asked.structures
    assert 0 < groups <= dense[1] and groups % split == 0 if goes else groups == dense[1]
    counts, wanted = asked.asked.counts, asked.asked.ratio * asked.asked.counts.total
    pruned = last - asked.protect_first
    widths = {*range(multiple_of, dense[0], multiple_of), dense[0]}

    def removed(width, groups):
        return pruned * (counts.units["neurons"] * (dense[0] - width) + counts.units["kv_groups"] * (dense[1] - groups))

    closest = min(abs(removed(it, groups) - wanted) for it in widths)
    assert abs(removed(width, groups) - wanted) == pytest.approx(closest, abs=1e-3)
    share = 1 - wanted / removed(0, 0)
    for other in range(1, dense[1] + 1):
        nearer = abs(other / dense[1] - share) < abs(groups / dense[1] - share) - 1e-9
        if goes and nearer and other % split == 0 and (pruned < layers or is_plain(*alike(asked, width, other))):
            least, most = removed(dense[0], other), removed(min(widths), other)
            assert not least <= wanted <= most, "neurons could make up the rest"


def alike(asked, width, groups):
    checkpoint = asked.asked.checkpoint
    layers = range(checkpoint.num_layers)
    each = {"neurons": width, "kv_groups": groups}
    return checkpoint, Shape(tuple(layers), {kind: (count,) * len(layers) for kind, count in each.items()})


@settings(derandomize=True, deadline=None, max_examples=40)
@given(targets(most_protected=0))
def test_without_protected_layers_the_checkpoint_is_plain(drawn):
    variant, changes, asked = drawn
    shape = shape_or_nothing(asked)
    assert is_plain(asked.asked.checkpoint, shape)
    (width,), (groups,) = (set(shape.units[kind]) for kind in BOTH)
    smaller = changes | {
        "num_key_value_heads": groups,
        "num_attention_heads": changes["num_attention_heads"] // changes["num_key_value_heads"] * groups,
        "intermediate_size": width,
        "head_dim": asked.asked.groups.implied["head_dim"],
    }
    if smaller["hidden_size"] % smaller["num_attention_heads"] and variant == "llama":
        variant = "mistral"  # which is written then
    assert asked.asked.counts.of(shape) == parameters_of(variant, **smaller)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.35, 0.5])
def test_of_neurons_alone_it_is_the_uniform_width(ratio):
    checkpoint = blank(**SMOLLM2)
    shape = target(checkpoint, ratio, NEURONS).shape()
    assert shape.units["neurons"] == uniform_shape(target(checkpoint, ratio, NEURONS).asked).units["neurons"]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(targets())
def test_what_a_message_calls_possible_is_possible_and_nothing_beyond(drawn):
    asked = drawn[2]
    try:
        asked.shape()
        return
    except UserError as error:
        told = re.search(r"possible is ([\d.]+)|that works is (\d+)|removes (nothing)", str(error))
    if told[3]:
        assert asked.asked.ratio < 0.2
    elif told[2]:
        assert target(asked.asked.checkpoint, 0.05, split=int(told[2]))._group_rows()
    elif float(told[1]) > 0:
        largest = float(told[1])
        assert replace(asked, asked=replace(asked.asked, ratio=largest)).shape()
        with pytest.raises(UserError, match="can't be reached"):
            replace(asked, asked=replace(asked.asked, ratio=largest + 2e-4)).shape()


def test_a_message_says_what_else_bounds_the_ratio_and_what_might_go_too():
    checkpoint = blank(**SMOLLM2)
    with pytest.raises(UserError) as caught:
        target(checkpoint, 0.6, NEURONS, protects=(4, 2)).shape()
    assert re.fullmatch(
        r"m: ratio 0.6 can't be reached by pruning neurons alone with the layers that prune.protect_first and "
        r"protect_last set aside; the largest possible is 0.4732; with kv_groups in "
        r"prune.structures 0.5[0-9]+",
        str(caught.value),
    )
    with pytest.raises(UserError, match=r"largest possible is 0\.0000"):
        target(checkpoint, 0.1, protects=(20, 20)).shape()
    with pytest.raises(UserError, match=r"removes nothing once units are rounded"):
        target(checkpoint, 0.001, multiple_of=256).shape()
    with pytest.raises(UserError, match=r"tensor_parallel 2 divides no number of KV groups .*works is 3"):
        target(checkpoint, 0.3, split=2, protects=(1, 0)).shape()


def test_layers_that_differ_lose_the_same_share_each():
    rows = {"intermediate_size": [40, 48, 20], "num_attention_heads": [8, 4, 8], "num_key_value_heads": [4, 2, 4]}
    changes = {field: max(row) for field, row in rows.items()} | {"num_hidden_layers": 3, "layer_sizes": rows}
    shape = target(blank(**changes), 0.2).shape()
    assert shape.units["kv_groups"] == (3, 2, 3) or shape.units["kv_groups"] == (2, 1, 2)
    left = [kept / dense for kept, dense in zip(shape.units["neurons"], rows["intermediate_size"], strict=True)]
    assert max(left) - min(left) < 1.1 / 20 and max(left) < 1


def test_ratios_that_come_to_the_same_shape_are_refused():
    method = Method(criterion="entropy", allocation="local", structures=[*BOTH], multiple_of=32)
    checkpoint = blank(**SMOLLM2)
    check_ratios(checkpoint, [0.2, 0.3], method, "m")
    with pytest.raises(UserError, match=r"ratios 0.2 and 0.2001 would be the same checkpoint"):
        check_ratios(checkpoint, [0.2, 0.2001], method, "m")

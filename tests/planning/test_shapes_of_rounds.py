"""Shapes that rounds may leave: each lies within the previous one, and no path ends before the ratio."""

import re

import pytest
from blank import SMOLLM2, blank, sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import VARIANTS

from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.known_shapes import Span, known_shape
from hfprune_dist.planning.multiples import with_numbers
from hfprune_dist.planning.plain_shapes import PlainShape, plain_shapes, ratio_of
from hfprune_dist.planning.ratios import check_ratios
from hfprune_dist.planning.rounds import round_ratios
from hfprune_dist.planning.shapes_of_rounds import plain_shapes_of_rounds
from hfprune_dist.planning.targets import target_of

ALL = ["neurons", "kv_groups", "layers"]


def plain(**settings):
    return Method(**{"criterion": "entropy", "allocation": "plain", "structures": ALL, **settings})


def lies_within(shape, before):
    smaller = (min(getattr(it, name) for it in (shape, before)) for name in ("num_layers", "kv_groups", "width"))
    return shape == PlainShape(*smaller) != before


PARTS = st.one_of(
    st.builds(dict, steps=st.integers(1, 4)), st.builds(dict, round_ratio=st.sampled_from([0.1, 0.15, 0.25, 0.4]))
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    sizes(),
    st.sampled_from(sorted(VARIANTS)),
    st.floats(0.01, 0.8),
    st.sampled_from([ALL, ALL[:2], ALL[::2]]),
    st.sampled_from([1, 1, 4, 8, "auto"]),
    PARTS,
)
def test_every_shape_lies_within_one_of_the_round_before_and_goes_on_to_the_ratio(
    changes, variant, ratio, structures, multiple_of, parts
):
    checkpoint = blank(variant, **changes)
    asked = plain(structures=structures, multiple_of=multiple_of, **parts)
    try:
        check_ratios(checkpoint, [ratio], asked, "m")
    except UserError as error:
        assert re.search("no shape of|can't be reached|prune.multiple_of comes to", str(error))
        assume(False)
    method = with_numbers(asked, checkpoint, ratio, "m")
    rounds = plain_shapes_of_rounds(method, checkpoint, ratio, "m")
    assert len(rounds) == len(round_ratios(method, ratio))
    before = [PlainShape.of(checkpoint)]
    for reached, shapes in zip(round_ratios(method, ratio), rounds, strict=True):
        target = target_of(method, checkpoint, reached, "m")
        assert shapes == sorted(set(shapes), reverse=True)
        assert all(any(lies_within(shape, it) for it in before) for shape in shapes)
        assert all(set(plain_shapes(target, it)) <= set(shapes) for it in before), "whichever stayed, there is a next"
        for shape in shapes:
            step = checkpoint.parameter_counts.units["neurons"] * shape.num_layers * method.multiple_of
            missing = (ratio_of(target, shape) - reached) * checkpoint.parameters
            least = step / 2 if method.multiple_of == 1 else 1e-6
            assert -least * (1 + 1e-9) <= missing <= step * (1 + 1e-9)
        before = shapes
    known = known_shape(checkpoint, ratio, asked, "m")
    assert known.width == Span.of(it.width for it in before)
    assert known.kv_heads == Span.of(it.kv_groups for it in before)


def test_one_round_has_the_shapes_that_there_are_without_rounds():
    checkpoint = blank(**SMOLLM2)
    for method in (plain(), plain(round_ratio=0.5)):
        (shapes,) = plain_shapes_of_rounds(method, checkpoint, 0.5, "m")
        assert shapes == plain_shapes(target_of(method, checkpoint, 0.5, "m"))
    assert known_shape(checkpoint, 0.5, plain(), "m").open == "the closest of 18 shapes, by measurement"
    assert known_shape(checkpoint, 0.5, plain(steps=2), "m").open == "one of 18 shapes, by measurement"


def test_auto_is_what_suits_every_round():
    checkpoint = blank(**SMOLLM2)
    (at_once, halves) = (
        with_numbers(plain(multiple_of="auto", steps=steps), checkpoint, 0.5, "m").multiple_of for steps in (1, 2)
    )
    alone = with_numbers(plain(multiple_of="auto"), checkpoint, 0.25, "m").multiple_of
    assert halves == min(at_once, alone)


def test_a_ratio_that_no_rounds_reach_is_told_as_without_rounds():
    checkpoint = blank(**SMOLLM2)
    for steps in (1, 3):
        with pytest.raises(UserError, match=r"m: ratio 0.9 can't be reached .*; the largest possible is 0.7452"):
            check_ratios(checkpoint, [0.9], plain(steps=steps), "m")


WAYS = [
    {"allocation": "plain", "structures": ALL},
    {"allocation": "local", "structures": ALL[:2]},
    {"allocation": "searched", "structures": ALL, "floor": 0.1},
    {"allocation": "global", "floor": 0.5},
    {},
]


@settings(derandomize=True, deadline=None, max_examples=150)
@given(sizes(), st.sampled_from(sorted(VARIANTS)), st.sampled_from(WAYS), st.sampled_from([1, 8, 32]), PARTS)
def test_the_largest_ratio_that_is_told_is_possible_or_told_as_that_of_a_single_round(
    changes, variant, way, multiple_of, parts
):
    checkpoint = blank(variant, **changes)
    at_once = Method(**{"criterion": "entropy", "multiple_of": multiple_of, **way})
    in_parts = at_once.model_copy(update=parts)
    with pytest.raises(UserError) as caught:
        check_ratios(checkpoint, [0.999], in_parts, "m")
    told = re.search(r"the largest possible is (0\.\d+)", str(caught.value))
    assume(told is not None and float(told[1]) > 0)
    largest, is_of_one = float(told[1]), str(caught.value).endswith("(in a single round)")
    check_ratios(checkpoint, [largest], at_once if is_of_one else in_parts, "m")
    if is_of_one:
        with pytest.raises(UserError, match=r"round|no shape of"):
            check_ratios(checkpoint, [largest], in_parts, "m")


def test_rounds_that_may_end_before_the_ratio_are_refused():
    """A round may leave a width from which only shapes with fewer KV groups follow, and the model can't have fewer."""
    checkpoint = blank(**SMOLLM2)
    with pytest.raises(UserError, match=r"m: no shape of .* comes to ratio 0.2[05].* within 30 layers, .*fewer steps"):
        check_ratios(checkpoint, [0.201], plain(round_ratio=0.2, multiple_of=512), "m")


def test_a_first_round_that_removes_too_little_is_named():
    """Larger ratios have the same first round, so the next larger shape is no help."""
    small = {"hidden_size": 56, "intermediate_size": 97, "num_hidden_layers": 31, "head_dim": 8, "vocab_size": 17}
    checkpoint = blank("qwen2", **small, num_attention_heads=8, num_key_value_heads=4)
    split = {"tensor_parallel": 3, "multiple_of": 3}  # all shapes lack a quarter of the KV groups
    check_ratios(checkpoint, [0.3], plain(**split), "m")
    with pytest.raises(
        UserError,
        match=r"m: no shape of .* comes to ratio 0.01, where the first round ends \(.*\); use .* larger prune.round_",
    ):
        check_ratios(checkpoint, [0.3], plain(**split, round_ratio=0.01), "m")

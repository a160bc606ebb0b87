"""Low-rank shapes, against models of such sizes and the formulas in LoRAP's code."""

import re
from dataclasses import replace

import pytest
from blank import LLAMA_7B, SMOLLM2, blank, sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import VARIANTS

from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.known_shapes import Span, known_shape
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.multiples import with_numbers
from hfprune_dist.planning.ratios import check_ratios, remarks_on_shapes
from hfprune_dist.planning.shape_target import ShapeTarget

METHOD = {"criterion": "lorap", "allocation": "low_rank"}


def target(checkpoint, ratio, multiple_of=1):
    return LowRankTarget(ShapeTarget(checkpoint, ratio, ("neurons",), multiple_of, "m"))


@st.composite
def targets(draw):
    changes = {**draw(sizes()), "num_hidden_layers": draw(st.integers(1, 3))}
    checkpoint = blank(draw(st.sampled_from(list(VARIANTS))), **changes)
    multiple_of = min(draw(st.sampled_from([1, 2, 8])), changes["intermediate_size"])
    return target(checkpoint, draw(st.floats(0.01, 0.9)), multiple_of)


def matrices_of(checkpoint):
    """Map the names of the first layer's matrices to their shapes [out, in]."""
    shapes = {name: it.shape for name, it in checkpoint.tensors.items() if ".layers.0." in name}
    return {name.split(".")[-2]: shape for name, shape in shapes.items() if len(shape) == 2}


@settings(derandomize=True, deadline=None, max_examples=100)
@given(targets())
def test_parameters_come_as_close_to_the_ratio_as_widths_can(asked):
    counts, checkpoint = asked.asked.counts, asked.asked.checkpoint
    try:
        shape = asked.shape()
    except UserError:
        assume(False)
    layers = checkpoint.num_layers
    (width,) = set(shape.units["neurons"])
    ranks = {name.split(".")[-1]: set(row) for name, row in shape.ranks.items()}
    removed = 0
    for name, (outputs, inputs) in matrices_of(checkpoint).items():
        (rank,) = ranks.get(name, {None})
        if rank is not None:
            assert rank >= 1 and rank * (outputs + inputs) < outputs * inputs
            removed += outputs * inputs - rank * (outputs + inputs)
    per_neuron, most = counts.units["neurons"], checkpoint.units.most
    assert counts.total - counts.of(shape) == layers * (removed + per_neuron * (most - width))
    wanted = asked.asked.ratio * counts.total
    widths = {*range(asked.asked.multiple_of, most, asked.asked.multiple_of), most}

    def misses(width):
        return abs(layers * (removed + per_neuron * (most - width)) - wanted)

    assert width in widths and misses(width) == pytest.approx(min(map(misses, widths)), abs=1e-3)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(targets())
def test_value_and_output_keep_three_times_what_query_and_key_keep_or_all(asked):
    try:
        shape = asked.shape()
    except UserError:
        assume(False)
    checkpoint, matrices = asked.asked.checkpoint, matrices_of(asked.asked.checkpoint)
    whole = checkpoint.num_layers * sum(outputs * inputs for outputs, inputs in matrices.values())
    keep = 1 - asked.asked.ratio * asked.asked.counts.total / whole
    share = {"v_proj": min(1.0, 1.5 * keep), "q_proj": max(0.5 * keep, 2 * keep - 1)}  # both pairs have the same size
    ranks = {name.split(".")[-1]: row[0] for name, row in shape.ranks.items()}
    for pair in (("v_proj", "o_proj"), ("q_proj", "k_proj")):
        for name in pair:
            outputs, inputs = matrices[name]
            exact = share[pair[0]] * outputs * inputs / (outputs + inputs)
            if name in ranks:
                assert ranks[name] == pytest.approx(max(1, int(exact + 1e-6)), abs=1e-6 if exact % 1 > 1e-6 else 1)
            else:
                assert share[pair[0]] > 1 - 1e-9 or outputs * inputs <= outputs + inputs


@pytest.mark.parametrize("keep", [0.8, 0.7, 0.6, 0.5, 0.3])
def test_without_grouped_queries_ranks_are_those_of_the_release(keep):
    checkpoint = blank(**LLAMA_7B)
    whole = 32 * sum(outputs * inputs for outputs, inputs in matrices_of(checkpoint).values())
    shape = target(checkpoint, (1 - keep) * whole / checkpoint.parameters).shape()
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


@settings(derandomize=True, deadline=None, max_examples=60)
@given(targets())
def test_what_a_message_calls_possible_is_possible_and_nothing_beyond(asked):
    try:
        asked.shape()
        return
    except UserError as error:
        told = re.search(r"possible is ([\d.]+)|removes (nothing)", str(error))
    if told[2]:
        assert asked.asked.ratio < 0.2
    else:
        largest = float(told[1])
        assert largest == 0 or replace(asked, asked=replace(asked.asked, ratio=largest)).shape()
        with pytest.raises(UserError, match="can't be reached with attention of low rank"):
            replace(asked, asked=replace(asked.asked, ratio=largest + 2e-4)).shape()


def test_dry_runs_know_the_shape_and_tell_the_ranks():
    checkpoint, method = blank(**SMOLLM2), Method(**METHOD, multiple_of=32)
    shape = known_shape(checkpoint, 0.2, method, "m")
    assert shape.kv_heads == Span(3, 3) and shape.layers == Span(30, 30) and shape.open == ""
    assert shape.width.least == shape.width.most < 1536 and shape.width.least % 32 == 0
    assert shape.reached.least == pytest.approx(0.2, abs=0.01)
    (told,) = remarks_on_shapes(checkpoint, [0.2], method, "m")
    assert re.fullmatch(
        r"m: at 0.2, in every layer q_proj_rank 142, k_proj_rank 71; attention's other matrices stay whole", told
    )


def test_the_multiple_that_is_found_removes_at_least_the_ratio_and_little_more():
    checkpoint, method, found = blank(**SMOLLM2), Method(**METHOD, multiple_of="auto"), set()
    for ratio in (0.15, 0.2, 0.25, 0.3, 0.35):
        multiple = with_numbers(method, checkpoint, ratio, "m").multiple_of
        shape = known_shape(checkpoint, ratio, method, "m")
        assert shape.width.least % multiple == 0
        assert multiple == 32 or ratio <= shape.reached.least <= ratio + 0.0125
        found.add(multiple)
    assert len(found) > 1


def test_ratios_are_refused_that_come_to_the_same_or_of_what_has_been_pruned():
    method = Method(**METHOD, multiple_of=256)
    check_ratios(blank(**SMOLLM2), [0.2, 0.3], method, "m")
    with pytest.raises(UserError, match=r"ratios 0.2 and 0.20001 would be the same checkpoint"):
        check_ratios(blank(**SMOLLM2), [0.2, 0.20001], method, "m")
    layers = {"num_hidden_layers": 2, "layer_sizes": {"intermediate_size": [20, 30]}}
    with pytest.raises(UserError, match=r"has layers that differ .* allocation: low_rank isn't possible"):
        check_ratios(blank(intermediate_size=30, **layers), [0.2], method, "m")


@pytest.mark.parametrize("criterion", ["lorap", "entropy"])
def test_what_has_low_rank_is_pruned_by_no_method(criterion):
    low = blank(num_hidden_layers=2, layer_sizes={"q_proj_rank": [3, 3]})
    assert not low.is_plain and low.ranks == {"self_attn.q_proj": (3, 3)}
    method = Method(**METHOD) if criterion == "lorap" else Method(criterion=criterion)
    with pytest.raises(UserError, match=r"low rank \(q_proj_rank in config.json\).*prune the model that it came from"):
        check_ratios(low, [0.2], method, "m")

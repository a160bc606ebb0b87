"""The multiples that ``multiple_of: auto`` resolves to."""

import re

import pytest
from blank import LLAMA_7B, SMOLLM2, blank, sizes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.multiples import MOST_BEYOND, MULTIPLES, check_multiple, with_numbers
from hfprune_dist.planning.plain_shapes import all_plain_shapes, plain_shapes, ratio_of
from hfprune_dist.planning.ratios import check_ratios, largest_split, remarks_on_shapes
from hfprune_dist.planning.shape_target import target_of
from hfprune_dist.planning.shapes import uniform_shape

BOTH = ["neurons", "kv_groups"]
ALL = [*BOTH, "layers"]


def method(allocation="plain", **options):
    neurons = ["neurons"]
    structures = {"uniform": neurons, "low_rank": neurons, "global": BOTH, "local": BOTH}.get(allocation, ALL)
    given = {"criterion": "surgeon", "multiple_of": "auto"} | options
    return Method(**given, allocation=allocation, structures=structures)


def multiple(checkpoint, ratio, it):
    return with_numbers(it, checkpoint, ratio, "m").multiple_of


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    sizes(),
    st.sampled_from([100, 1023, 1024, 3000, 11008]),
    st.floats(0.02, 0.9),
    st.sampled_from(["plain", "uniform", "global", "local"]),
)
def test_it_is_the_largest_that_costs_little(changes, width, ratio, allocation):
    checkpoint = blank("mistral", **changes | {"intermediate_size": width})
    auto = method(allocation)
    chosen = multiple(checkpoint, ratio, auto)
    fitting = [it for it in MULTIPLES if suits(it, checkpoint, ratio, auto)]
    assert chosen == (fitting[0] if fitting else 32 if width >= 1024 else 1)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    width=st.sampled_from([40, 64, 200, 300, 1023, 1500, 3000]),
    layers=st.integers(1, 6),
    ratio=st.floats(0.003, 0.6),
    allocation=st.sampled_from(["plain", "uniform", "global", "local", "searched", "low_rank"]),
)
def test_no_ratio_is_refused_because_of_it(width, layers, ratio, allocation):
    """Unless it is the least that there is, which a person may still undercut."""
    options = {"criterion": "lorap", "refit": "none"} if allocation == "low_rank" else {}
    auto = method(allocation, **options)
    checkpoint = blank("mistral", **SMOLLM2 | {"num_hidden_layers": layers, "intermediate_size": width})
    least = 32 if width >= 1024 else 1
    if possible(checkpoint, ratio, auto.model_copy(update={"multiple_of": least})):
        assert possible(checkpoint, ratio, auto)


def possible(checkpoint, ratio, it):
    try:
        check_ratios(checkpoint, [ratio], it, "m")
    except UserError:
        return False
    return True


@pytest.mark.parametrize("allocation", ["plain", "local"])
@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.floats(0.05, 0.55))
def test_what_three_devices_make_of_it_costs_as_little(allocation, ratio):
    """Of 256 they make 768: half of this model's width."""
    checkpoint, shared = blank(**SMOLLM2), method(allocation, tensor_parallel=3)
    fitting = [it for it in (768, 384, 192, 96) if suits(it, checkpoint, ratio, shared)]
    assert multiple(checkpoint, ratio, shared) == (fitting[0] if fitting else 96)


def test_three_devices_put_no_ratio_out_of_reach():
    asked = [0.09, 0.19, 0.29]
    shapes = [local_shape(blank(**SMOLLM2), it, settled_for_three(it)) for it in asked]
    reached = [blank(**SMOLLM2).parameter_counts.ratio(shape) for shape in shapes]
    assert reached == pytest.approx(asked, abs=0.02)


def settled_for_three(ratio):
    return with_numbers(method("local", tensor_parallel=3), blank(**SMOLLM2), ratio, "m")


def suits(it, checkpoint, ratio, auto):
    if auto.allocation == "uniform":
        asked = target_of(auto.model_copy(update={"multiple_of": it}), checkpoint, ratio, "m")
        try:
            return ratio <= asked.counts.ratio(uniform_shape(asked)) <= ratio + MOST_BEYOND
        except UserError:
            return False
    if auto.allocation == "local":
        shape = local_shape(checkpoint, ratio, auto.model_copy(update={"multiple_of": it}))
        return shape is not None and ratio <= checkpoint.parameter_counts.ratio(shape) <= ratio + MOST_BEYOND
    asked, finest = (
        target_of(auto.model_copy(update={"multiple_of": each}), checkpoint, ratio, "m") for each in (it, 1)
    )
    reached = [ratio_of(asked, shape) for shape in all_plain_shapes(asked)]
    little = len(reached) == len(all_plain_shapes(finest)) > 0 and max(reached) <= ratio + MOST_BEYOND
    return little and works(checkpoint, ratio, auto.model_copy(update={"multiple_of": it}), 1)


def local_shape(checkpoint, ratio, method):
    try:
        return LocalTarget(target_of(method, checkpoint, ratio, "m"), 0, 0).shape()
    except UserError:
        return None


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.floats(0.05, 0.7))
def test_at_least_the_ratio_goes_and_little_more(ratio):
    checkpoint = blank(**SMOLLM2)
    settled = with_numbers(method(), checkpoint, ratio, "m")
    asked = target_of(settled, checkpoint, ratio, "m")
    for shape in plain_shapes(asked):
        assert ratio - 1e-12 <= ratio_of(asked, shape) <= ratio + MOST_BEYOND


@pytest.mark.parametrize(("ratio", "expected"), [(0.2, 32), (0.5, 32)])
def test_of_a_small_model_it_is_small(ratio, expected):
    assert multiple(blank(**SMOLLM2), ratio, method()) == expected


@pytest.mark.parametrize(("share", "layers", "number"), [(0.125, 32, 4), (0.0625, 30, 2), (0.125, 2, 0), (3, 30, 3)])
def test_protected_layers_are_a_number_or_a_share_of_the_models(share, layers, number):
    checkpoint = blank(**SMOLLM2 | {"num_hidden_layers": layers})
    protecting = method("local", protect_first=share, protect_last=1)
    settled = with_numbers(protecting, checkpoint, 0.2, "m")
    assert settled.protected() == (number, 1) and type(settled.protect_first) is int


@pytest.mark.parametrize("protects", [{"protect_first": 2**31 - 1}, {"protect_last": 2**31 - 1}])
@pytest.mark.parametrize("allocation", ["local", "global", "searched"])
def test_more_protected_layers_than_there_are_take_no_memory(allocation, protects):
    with pytest.raises(UserError, match="leave none of its 30 layers to prune"):
        check_ratios(blank(**SMOLLM2), [0.2], method(allocation, **protects), "m")


def test_of_a_large_model_it_is_large():
    assert multiple(blank(**LLAMA_7B), 0.5, method()) >= 64


@pytest.mark.parametrize(
    ("structures", "floor", "ratio", "expected"),
    [(["neurons"], 0.2, 0.5, 256), (["neurons"], 0.2, 0.51, 64), (BOTH, 0.4, 0.68, 256), (BOTH, 0.4, 0.69, 64)],
)
@pytest.mark.parametrize("allocation", ["global", "searched"])
def test_none_puts_the_ratio_out_of_reach_of_floors(allocation, structures, floor, ratio, expected):
    """Floors are rounded up to the multiple."""
    checkpoint = blank(**LLAMA_7B)
    competing = Method(
        criterion="surgeon", structures=structures, allocation=allocation, floor=floor, multiple_of="auto"
    )
    assert multiple(checkpoint, ratio, competing) == expected
    check_ratios(checkpoint, [ratio], competing, "m")


def test_what_is_given_stays():
    assert multiple(blank(**SMOLLM2), 0.2, method(multiple_of=48)) == 48


def test_ratios_that_come_to_the_same_shapes_are_refused():
    checkpoint = blank(**SMOLLM2)
    check_ratios(checkpoint, [0.2, 0.3], method(), "m")
    with pytest.raises(
        UserError, match=r"m: ratios 0.2 and 0.2001 .* same checkpoint once .* multiples of 32; leave one"
    ):
        check_ratios(checkpoint, [0.2, 0.2001], method(), "m")
    with pytest.raises(UserError, match=r"ratios 0.2 and 0.20001 would be the same checkpoint"):
        check_ratios(checkpoint, [0.2, 0.20001], method("searched", multiple_of=32), "m")


@pytest.mark.parametrize("allocation", ["plain", "local", "global", "searched"])
@settings(derandomize=True, deadline=None, max_examples=15)
@given(sizes(), st.floats(0.02, 0.6))
def test_the_largest_split_works_and_no_larger_one_does(allocation, changes, ratio):
    checkpoint, some = blank("mistral", **changes), method(allocation, multiple_of=1)
    assume(works(checkpoint, ratio, some, 1))
    largest = largest_split(checkpoint, [ratio], {"m": some})
    assert works(checkpoint, ratio, some, largest)
    larger = range(largest + 1, changes["num_key_value_heads"] + 2)
    assert not any(works(checkpoint, ratio, some, size) for size in larger)


def test_the_largest_split_works_with_every_method_and_ratio():
    """Nine groups are too few for one of them, and nine devices can't share the twelve groups of the other."""
    sizes = {"num_key_value_heads": 12, "num_attention_heads": 12, "hidden_size": 48, "intermediate_size": 96}
    checkpoint = blank("mistral", **sizes, num_hidden_layers=6, vocab_size=64, head_dim=4)
    methods = {name: method(name, multiple_of=1) for name in ("local", "searched")}
    alone = {name: largest_split(checkpoint, [0.2, 0.6], {name: it}) for name, it in methods.items()}
    assert alone == {"local": 9, "searched": 12}
    assert largest_split(checkpoint, [0.2, 0.6], methods | {"neurons": method("uniform")}) == 6
    assert largest_split(checkpoint, [0.2], {"neurons": method("uniform")}) is None


def works(checkpoint, ratio, some, tensor_parallel):
    try:
        check_ratios(checkpoint, [ratio], some.model_copy(update={"tensor_parallel": tensor_parallel}), "m")
    except UserError:
        return False
    return True


def test_remarks_name_the_multiple_of_each_ratio():
    told = remarks_on_shapes(blank(**SMOLLM2), [0.2, 0.5], method(), "m")
    assert told == ["m: multiple_of is 32 at 0.2, 32 at 0.5"]
    assert remarks_on_shapes(blank(**SMOLLM2), [0.2], method("uniform", multiple_of=1), "m") == []


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    sizes(),
    st.sampled_from([90, 100, 1536]),
    st.floats(0.05, 0.5),
    st.sampled_from(["auto", 1, 2, 5, 32]),
    st.integers(1, 6),
    st.sampled_from(["plain", "global"]),
)
def test_devices_share_groups_and_neurons(changes, width, ratio, multiple_of, devices, allocation):
    checkpoint = blank("mistral", **changes | {"intermediate_size": width})
    split = method(allocation, multiple_of=multiple_of, tensor_parallel=devices)
    try:
        check_ratios(checkpoint, [ratio], split, "m")
    except UserError:
        assume(False)
    settled = with_numbers(split, checkpoint, ratio, "m")
    assert settled.multiple_of % devices == 0 and (multiple_of == "auto" or settled.multiple_of % multiple_of == 0)
    if allocation == "plain":
        shapes = plain_shapes(target_of(settled, checkpoint, ratio, "m"))
        assert all(it.width % devices == 0 == it.kv_groups % devices for it in shapes)


def test_neurons_alone_are_not_rounded_for_devices():
    neurons = Method(criterion="surgeon", structures=["neurons"], tensor_parallel=4)
    assert multiple(blank(**SMOLLM2), 0.2, neurons) == 1


@pytest.mark.parametrize(
    ("multiple_of", "devices", "told"),
    [
        (2048, 1, "2048, but layers have 1536 neurons at most; use a number up to 1536"),
        (1024, 3, "3072 with prune.tensor_parallel 3, .*; use a number up to 512, or a multiple of 3 up to 1536"),
        (1, 2000, "2000 with prune.tensor_parallel 2000, .*; use a prune.tensor_parallel up to 1536"),
    ],
)
def test_multiples_beyond_the_width_are_refused(multiple_of, devices, told):
    with pytest.raises(UserError, match=f"multiple_of comes to {told}$"):
        check_ratios(blank(**SMOLLM2), [0.2], method(multiple_of=multiple_of, tensor_parallel=devices), "m")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.sampled_from([BOTH, ["neurons"]]), st.data())
def test_advice_on_multiples_beyond_the_width_can_be_followed(width, multiple_of, devices, structures, data):
    """It is enough for any number of devices, those that neurons alone aren't rounded for among them."""
    checkpoint = blank("mistral", intermediate_size=width)
    asked = Method(
        criterion="surgeon",
        allocation="global",
        structures=structures,
        multiple_of=multiple_of,
        tensor_parallel=devices,
    )
    told = refusal_of_multiple(checkpoint, asked)
    assume(told)
    assert ("tensor_parallel" in told) == (structures == BOTH and devices > 1)
    if found := re.search(r"use a prune.tensor_parallel up to (\d+)$", told):
        asked = asked.model_copy(update={"tensor_parallel": data.draw(st.integers(1, int(found[1])))})
        told = refusal_of_multiple(checkpoint, asked) or "use a number up to 1"
    numbers = re.search(r"use a number up to (\d+)(?:, or a multiple of (\d+) up to (\d+))?$", told)
    most, step, largest = (int(it or 1) for it in numbers.groups())
    advised = data.draw(st.integers(1, most) | st.integers(1, largest // step).map(lambda it: it * step))
    assert refusal_of_multiple(checkpoint, asked.model_copy(update={"multiple_of": advised})) is None


def refusal_of_multiple(checkpoint, asked):
    try:
        check_multiple(checkpoint, with_numbers(asked, checkpoint, 0.2, "m"), "m")
    except UserError as error:
        return str(error)
    return None

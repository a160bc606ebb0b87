"""What a method comes to on a model: multiples, protected layers, students, what adapts, and sizes in dry runs."""

import pytest
from blank import LLAMA_7B, SMOLLM2, blank
from families import save_model
from headers import CONFIG, checkpoint_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.importance import StudentParameters
from hfprune_dist.planning.ratios import (
    MOST_BEYOND,
    MULTIPLES,
    check_ratios,
    with_numbers,
)
from hfprune_dist.planning.remarks import planned_sizes, remarks_on_shapes, sizes_of
from hfprune_dist.planning.shapes import plain_shapes, shapes_for
from hfprune_dist.planning.target import Target

BOTH, ALL = ["neurons", "kv_groups"], ["neurons", "kv_groups", "layers"]
SMOL = blank(**SMOLLM2)


def method(allocation="plain", **options):
    neurons = ["neurons"]
    structures = {"uniform": neurons, "low_rank": neurons, "global": BOTH, "local": BOTH}.get(allocation, ALL)
    given = {"criterion": "surgeon", "multiple_of": "auto"} | options
    return Method(**{"allocation": allocation, "structures": structures} | given)


@settings(max_examples=25)
@given(
    width=st.sampled_from([64, 300, 1023, 1500, 3000]),
    devices=st.sampled_from([1, 3]),
    ratio=st.floats(0.01, 0.6),
    allocation=st.sampled_from(["plain", "uniform", "global", "local", "searched", "low_rank"]),
)
def test_auto_is_the_largest_multiple_that_costs_little(width, devices, ratio, allocation):
    checkpoint = blank("mistral", **SMOLLM2 | {"num_hidden_layers": 4, "intermediate_size": width})
    auto = method(allocation, tensor_parallel=devices)
    least = 32 if width >= 1024 else 1

    def shapes(multiple_of):
        try:
            settled = with_numbers(auto.model_copy(update={"multiple_of": multiple_of}), checkpoint, ratio, "m")
            target = Target.of(checkpoint, settled, ratio, "m")
            found = shapes_for(target)
        except UserError:
            return [], 0
        return (plain_shapes(target) if not found or allocation == "plain" else found), 1

    def suits(multiple_of):
        found, reached = shapes(multiple_of)[0], checkpoint.parameter_counts.ratio
        within = all(ratio - 1e-9 <= reached(it) <= ratio + MOST_BEYOND for it in found)
        return len(found) == len(shapes(1)[0]) > 0 and within

    chosen = next(filter(suits, MULTIPLES), least)
    settled = with_numbers(auto, checkpoint, ratio, "m")
    assert settled.multiple_of % chosen == 0 == settled.multiple_of % settled.split
    assert settled.multiple_of <= chosen * devices
    if shapes(least)[1]:
        check_ratios(checkpoint, [ratio], auto, "m")


def test_multiples_of_large_and_small_models():
    large = blank(**LLAMA_7B)
    assert [with_numbers(method(), SMOL, it, "m").multiple_of for it in (0.2, 0.5)] == [32, 32]
    assert with_numbers(method(), large, 0.5, "m").multiple_of >= 64
    assert with_numbers(method(multiple_of=48), SMOL, 0.2, "m").multiple_of == 48
    assert with_numbers(method(multiple_of=32, tensor_parallel=3), SMOL, 0.2, "m").multiple_of == 96
    for allocation in ("global", "searched"):  # floors are rounded up to the multiple
        floor = method(allocation, structures=BOTH, floor=0.4)
        assert [with_numbers(floor, large, it, "m").multiple_of for it in (0.68, 0.69)] == [256, 64]


@pytest.mark.parametrize(("share", "layers", "number"), [(0.125, 32, 4), (0.0625, 30, 2), (0.125, 2, 0), (3, 30, 3)])
def test_protected_layers_are_a_number_or_a_share_of_the_models(share, layers, number):
    checkpoint = blank(**SMOLLM2 | {"num_hidden_layers": layers})
    settled = with_numbers(method("local", protect_first=share, protect_last=1), checkpoint, 0.2, "m")
    assert settled.protected() == (number, 1) and type(settled.protect_first) is int


@pytest.mark.parametrize(
    ("model_type", "changes", "told"),
    [
        ("phi3", {"structures": ["neurons", "layers"]}, "KV groups stay: "),
        ("cohere2", {"refit": "dense"}, "refit is dense, and no norm is refitted: "),
        ("llama", {}, None),
    ],
)
def test_a_method_that_adapts_does_without(tmp_path, model_type, changes, told):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", model_type))
    whole = {"criterion": "entropy", "structures": ALL, "allocation": "plain", "refit": "block"}
    adaptive = Method(**whole, adapts=True)
    check_ratios(checkpoint, [0.1], adaptive, "m by it")
    settled = with_numbers(adaptive, checkpoint, 0.1, "m by it")
    assert settled == adaptive.model_copy(update=changes)
    assert settled.of_one_cut() == Method(**whole | changes).of_one_cut(), "fingerprints are of what is done"
    remarks = remarks_on_shapes(checkpoint, [0.1], adaptive, "m by it")
    assert len(remarks) == bool(told) and all(told in it for it in remarks)


def test_remarks_name_multiples():
    assert remarks_on_shapes(SMOL, [0.2, 0.5], method(), "m") == ["m: multiple_of is 32 at 0.2, 32 at 0.5"]


def test_what_cannot_be_pruned_is_refused_by_name():
    low = blank(num_hidden_layers=2, layer_sizes={"q_proj_rank": [3, 3]})
    assert not low.is_plain and low.ranks == {"self_attn.q_proj": (3, 3)}
    with pytest.raises(UserError, match=r"low rank \(q_proj_rank in config.json\).*prune the model that it came from"):
        check_ratios(low, [0.2], Method(criterion="entropy"), "m")


# Students.


@pytest.mark.parametrize(("ratio", "published"), [(0.05, (0.4, 0.2)), (0.26, (0.42, 0.5)), (0.7, (0.1, 0.2))])
def test_what_a_student_leaves_open_is_as_published_for_the_nearest_ratio(ratio, published):
    student = StudentParameters.of(ratio)
    assert (student.lacks, student.teacher_share, student.teacher_temperature) == (0.025, *published)


def test_a_ratio_at_which_neurons_without_a_score_would_stay_is_refused():
    checkpoint = blank(intermediate_size=100, num_hidden_layers=2)
    student = Method(criterion="coupled_taylor_distilled")
    least = 2 * 2 * checkpoint.parameters_per_unit / checkpoint.parameters
    check_ratios(checkpoint, [least], student, "m")
    check_ratios(checkpoint, [0.9 * least], student.model_copy(update={"criterion": "coupled_taylor"}), "m")
    with pytest.raises(UserError, match=rf"m: ratio .* lacks, which is {least:.4f} of all"):
        check_ratios(checkpoint, [0.9 * least], student, "m")


# Sizes in dry runs.


def sizes_at(ratio, **options):
    return planned_sizes(SMOL, ratio, method(**options), "m")


def test_sizes_are_as_far_known_as_the_plan_decides_them():
    assert sizes_of(SMOL) == {"width": "1536", "KV heads": "3", "layers": "30", "ratio": "0.0000"}
    uniform = sizes_at(0.2, allocation="uniform", multiple_of=1)
    assert uniform == {"width": "1017", "KV heads": "3", "layers": "30", "ratio": "0.2000", "note": ""}
    protected = sizes_at(0.4, allocation="local", multiple_of=1, protect_first=1)
    assert protected["width"].endswith("-1536") and protected["KV heads"] == "1-3" and protected["ratio"] == "0.3999"
    plain = sizes_at(0.5, multiple_of=1)
    assert plain["note"] == "the closest of 18 shapes, by measurement" and plain["layers"] == "20-30"
    low = sizes_at(0.2, allocation="low_rank", criterion="lorap", multiple_of=32)
    assert low["note"] == "q_proj_rank 142, k_proj_rank 71" and low["KV heads"] == "3"
    assert sizes_at(0.2, allocation="global") == {"layers": "30", "note": "scores decide, layer by layer"}
    assert sizes_at(0.2, allocation="searched") == {"note": "a search decides, layer by layer"}


def test_sizes_of_a_mixture_name_its_experts():
    config = {**CONFIG, "num_hidden_layers": 2, "intermediate_size": 64, "first_k_dense_replace": 0}
    config |= {"moe_intermediate_size": 64, "num_experts": 12, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1}
    checkpoint, experts = checkpoint_of(config), Method(criterion="entropy", structures=["experts"], multiple_of="auto")
    assert sizes_of(checkpoint)["experts"] == "12"
    planned = planned_sizes(checkpoint, 0.25, experts, "m")
    assert (planned["experts"], planned["width"]) == ("8", "64")

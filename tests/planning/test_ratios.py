"""What a method comes to on a model: multiples, protected layers, students, what adapts, and sizes in dry runs."""

import pytest
from blank import LLAMA_7B, SMOLLM2, blank
from families import save_model

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.importance import StudentParameters
from hfprune_dist.planning.ratios import check_ratios, with_numbers
from hfprune_dist.planning.remarks import planned_sizes, remarks_on_method, sizes_of

BOTH, ALL = ["neurons", "kv_groups"], ["neurons", "kv_groups", "layers"]
SMOL = blank(**SMOLLM2)


def method(allocation="plain", **options):
    neurons = ["neurons"]
    structures = {"uniform": neurons, "low_rank": neurons, "global": BOTH, "local": BOTH}.get(allocation, ALL)
    given = {"criterion": "surgeon", "multiple_of": "auto"} | options
    return Method(**{"allocation": allocation, "structures": structures} | given)


def test_multiples_of_large_and_small_models():
    """A step of 32 neurons in all layers is 1.2 % of SmolLM2-135M, and 0.2 % of LLaMA-7B."""
    large = blank(**LLAMA_7B)
    auto, split = method(), method(multiple_of=32, tensor_parallel=3)
    assert [with_numbers(auto, checkpoint).multiple_of for checkpoint in (SMOL, large)] == [32, 128]
    small = blank(**SMOLLM2 | {"intermediate_size": 1023, "vocab_size": 64})
    assert with_numbers(auto, small).multiple_of == 1
    assert with_numbers(method(multiple_of=48), SMOL).multiple_of == 48
    assert with_numbers(split, SMOL).multiple_of == 96


@pytest.mark.parametrize(("share", "layers", "number"), [(0.125, 32, 4), (0.0625, 30, 2), (0.125, 2, 0), (3, 30, 3)])
def test_protected_layers_are_a_number_or_a_share_of_the_models(share, layers, number):
    checkpoint = blank(**SMOLLM2 | {"num_hidden_layers": layers})
    settled = with_numbers(method("local", protect_first=share, protect_last=1), checkpoint)
    assert (settled.protect_first, settled.protect_last) == (number, 1) and type(settled.protect_first) is int


@pytest.mark.parametrize(
    ("model_type", "changes", "told"),
    [
        ("phi3", {"structures": ["neurons", "layers"]}, "KV groups stay: "),
        ("cohere2", {"refit": "dense"}, "refit is dense: "),
        ("llama", {}, None),
    ],
)
def test_a_method_that_adapts_does_without(tmp_path, model_type, changes, told):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", model_type))
    whole = {"criterion": "entropy", "structures": ALL, "allocation": "plain", "refit": "block"}
    adaptive = Method(**whole, adapts=True)
    check_ratios(checkpoint, [0.1], adaptive, "m by it")
    alike = Method(**whole | changes, adapts=True)
    assert with_numbers(adaptive, checkpoint) == with_numbers(alike, checkpoint), "fingerprints are of what is done"
    remarks = remarks_on_method(checkpoint, adaptive, "m by it")
    assert len(remarks) == bool(told) and all(told in remark for remark in remarks)


def test_what_cannot_be_pruned_is_refused_by_name():
    low = blank(num_hidden_layers=2, layer_sizes={"q_proj_rank": [3, 3]})
    assert not low.is_plain and low.ranks == {"self_attn.q_proj": (3, 3)}
    with pytest.raises(UserError, match=r"low rank \(q_proj_rank in config.json\).*prune the model that it came from"):
        check_ratios(low, [0.2], Method(criterion="entropy"), "m")


# Students.


@pytest.mark.parametrize(("ratio", "published"), [(0.05, (0.4, 0.2)), (0.26, (0.42, 0.5)), (0.7, (0.1, 0.2))])
def test_what_a_student_leaves_open_is_as_published_for_the_nearest_ratio(ratio, published):
    student = StudentParameters.at_ratio(ratio)
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
    assert sizes_at(0.2, allocation="global") == {"note": "scores decide, layer by layer"}
    assert sizes_at(0.2, allocation="searched") == {"note": "a search decides, layer by layer"}

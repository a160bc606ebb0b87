"""Ratios that an architecture rules out are refused with the plan, by name."""

import re

import pytest
from blank import SMOLLM2, blank
from families import save_model

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.methods import CRITERIA
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.known_shapes import dense_shape, known_shape
from hfprune_dist.planning.multiples import with_numbers
from hfprune_dist.planning.ratios import check_ratios, remarks_on_shapes
from hfprune_dist.planning.shape_target import target_of

PLAIN = {"criterion": "entropy", "multiple_of": 1}


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
    whole = {"structures": ["neurons", "kv_groups", "layers"], "allocation": "plain", "refit": "block"}
    method = Method(**PLAIN | whole, adapts=True)
    check_ratios(checkpoint, [0.1], method, "m by it")
    settled = with_numbers(method, checkpoint, 0.1, "m by it")
    assert settled == method.model_copy(update=changes)
    assert settled.of_one_cut() == Method(**PLAIN | whole | changes).of_one_cut(), "fingerprints are of what is done"
    remarks = [it for it in remarks_on_shapes(checkpoint, [0.1], method, "m by it") if "tensor_parallel" not in it]
    assert len(remarks) == bool(told) and all(told in it for it in remarks)
    assert known_shape(checkpoint, 0.1, method, "m by it").layers is not None


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("allocation", ["plain", "searched"])
@pytest.mark.parametrize("structures", [["neurons", "layers"], ["neurons", "kv_groups"]])
def test_engines_that_cannot_load_fewer_heads_are_told(tmp_path, model_type, allocation, structures):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", model_type))
    method = Method(criterion="entropy", structures=structures, allocation=allocation)
    told = [it for it in remarks_on_shapes(checkpoint, [0.1], method, "m by it") if "vLLM" in it]
    expected = model_type == "qwen2" and allocation == "plain" and "kv_groups" in structures
    assert [it.startswith("m by it: where KV groups go, vLLM and SGLang can't load") for it in told] == [
        True
    ] * expected


def test_heads_that_stay_are_shown(tmp_path):
    heads = dense_shape(open_checkpoint(save_model(tmp_path / "m", "olmo2"))).kv_heads
    assert (heads.least, heads.most) == (2, 2)


@pytest.mark.parametrize("allocation", ["local", "global", "standardized", "searched"])
@pytest.mark.parametrize(("first", "last"), [(3, 0), (1, 2), (20, 20)])
def test_layers_that_are_all_protected_are_refused(tmp_path, allocation, first, last):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", "llama"))
    method = Method(**PLAIN, allocation=allocation, protect_first=first, protect_last=last)
    with pytest.raises(UserError, match=rf"m by it: prune.protect_first {first} and .* {last} leave none of its 3 la"):
        check_ratios(checkpoint, [0.1], method, "m by it")


@pytest.mark.parametrize(
    ("allocation", "helps"), [("global", "kv_groups"), ("standardized", "kv_groups"), ("searched", "kv_groups and la")]
)
def test_where_a_ratio_is_out_of_reach_only_what_the_allocation_takes_is_named(tmp_path, allocation, helps):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", "llama"))
    method = Method(**PLAIN, allocation=allocation)
    target = target_of(method, checkpoint, 0.9, "m by it")
    with pytest.raises(UserError, match=rf"; with {helps}[a-z]* in prune.structures"):
        budget_of(target, (0.2, 0, 0))


@pytest.mark.parametrize("structures", [["neurons"], ["neurons", "kv_groups"]])
def test_ratios_that_scores_divide_among_layers_differ_by_a_step_and_stay_above_floors(tmp_path, structures):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", "llama", intermediate_size=64))
    method = Method(criterion="entropy", allocation="global", structures=structures, multiple_of=8, floor=0.5)
    check_ratios(checkpoint, [0.1, 0.15], method, "m by it")
    with pytest.raises(UserError, match=r"ratios 0.1 and 0.1001 would be the same checkpoint"):
        check_ratios(checkpoint, [0.1, 0.1001], method, "m by it")
    with pytest.raises(UserError, match=r"ratio 0.6 can't be reached.* with the floors"):
        check_ratios(checkpoint, [0.6], method, "m by it")


ALL = ["neurons", "kv_groups", "layers"]


@pytest.mark.parametrize("split", [2, 3, 4])
@pytest.mark.parametrize("ratio", [0.0, 0.95])
@pytest.mark.parametrize(
    "settings",
    [
        *({"allocation": it} for it in ("uniform", "local", "global", "standardized", "searched")),
        *({"allocation": it, "structures": ["neurons", "layers"]} for it in ("plain", "searched")),
        {"criterion": "lorap", "allocation": "low_rank"},
    ],
)
def test_a_split_without_an_effect_is_in_no_message(settings, ratio, split):
    """SMOLLM2 has three KV groups, which most of these numbers of devices don't divide."""
    checkpoint, told = blank(**SMOLLM2), []
    for method in (Method(**PLAIN | settings), Method(**PLAIN | settings, tensor_parallel=split)):
        with pytest.raises(UserError) as error:
            check_ratios(checkpoint, [ratio], method, "m by it")
        told.append(str(error.value))
    assert "tensor_parallel" not in told[1]
    # With KV groups it would have one.
    assert told[0].partition("; with kv_groups")[0] == told[1].partition("; with kv_groups")[0]


@pytest.mark.parametrize(("multiple_of", "split", "helps"), [(1, 1, False), (64, 1, True), (1, 3, False), (2, 3, True)])
@pytest.mark.parametrize(
    ("allocation", "structures"), [("uniform", ALL[:1]), ("local", ALL[:2]), ("global", ALL[:2]), ("searched", ALL)]
)
def test_a_smaller_multiple_is_advised_where_there_is_one(allocation, structures, multiple_of, split, helps):
    method = Method(**PLAIN | {"multiple_of": multiple_of}, allocation=allocation, structures=structures)
    method = method.model_copy(update={"tensor_parallel": split})
    with pytest.raises(UserError, match="use a larger ratio") as told:
        check_ratios(blank(**SMOLLM2), [1e-7], method, "m")
    assert ("or a smaller prune.multiple_of" in str(told.value)) == helps
    with pytest.raises(UserError, match="leave one of them out") as told:
        check_ratios(blank(**SMOLLM2), [0.3, 0.3 + 1e-7], method, "m")
    assert ("or use a smaller prune.multiple_of" in str(told.value)) == helps


@pytest.mark.parametrize("allocation", ["global", "searched"])
def test_the_largest_ratio_within_floors_is_told_and_can_be_reached(allocation):
    checkpoint, method = blank(**SMOLLM2), Method(**PLAIN, allocation=allocation, floor=0.5)
    with pytest.raises(UserError, match=r"m: ratio 0\.9 can't be reached by .* with the floors") as told:
        check_ratios(checkpoint, [0.9], method, "m")
    check_ratios(checkpoint, [told.value.largest], method, "m")


@pytest.mark.parametrize("split", [1, 2, 3, 4])
@pytest.mark.parametrize("multiple_of", [1, 64, "auto"])
@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "local"},
        {"allocation": "local", "protect_first": 1},
        {"allocation": "searched", "structures": ["neurons", "layers"]},
        *({"allocation": "plain", "structures": ["neurons", it]} for it in ("kv_groups", "layers")),
    ],
)
def test_the_ratio_promised_for_more_structures_is_reached_on_as_many_devices(settings, multiple_of, split):
    checkpoint = blank(**SMOLLM2)
    method = Method(**PLAIN | settings | {"multiple_of": multiple_of}, tensor_parallel=split)
    with pytest.raises(UserError) as told:
        check_ratios(checkpoint, [0.97], method, "m")
    promised = re.search(r"; with (\w+) in prune.structures (0\.\d+)$", str(told.value))
    assert promised or split > 1, "one device hides nothing"
    if promised:
        wider = Method(**method.model_dump() | {"structures": [*method.structures, promised[1]]})
        check_ratios(checkpoint, [float(promised[2])], wider, "m")


@pytest.mark.parametrize("criterion", [name for name, it in CRITERIA.items() if "neurons" in it.units])
def test_kv_groups_are_only_promised_to_criteria_that_score_them(criterion):
    with pytest.raises(UserError, match="can't be reached") as error:
        check_ratios(blank(**SMOLLM2), [0.97], Method(**PLAIN | {"criterion": criterion}, allocation="local"), "m")
    has_groups = "kv_groups" in CRITERIA[criterion].units
    assert ("; with kv_groups in prune.structures" in str(error.value)) is has_groups

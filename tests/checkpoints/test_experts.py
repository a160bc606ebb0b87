"""Every mixture of experts that can be pruned, compared with transformers on a tiny model of it.

Experts of ``MORE_EXPERTS`` share the form of one in ``EXPERTS``, so that only their differences are tested: everything
around the experts, and their names in files and in config.json.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from families import EXPERTS, save_model, with_experts
from families_lora import trained_and_merged
from families_masked import assert_same, dense_of, through_layers
from families_ranks import assert_two_ranks_have_the_bits_of_one
from masking import write
from mixtures import KIND, definition, experts_of, some_kept
from more_families import MORE_EXPERTS
from peft import PeftModel
from ranks import SoloWorld
from refitting import refit
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import read_adapter
from hfprune_dist.checkpoints.pruned_config import is_plain
from hfprune_dist.config.method import Method
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.errors import UserError
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.models.single_layer import LayerReader, run
from hfprune_dist.planning.ratios import check_ratios, remarks_on_shapes
from hfprune_dist.scoring.shard_scorer import ShardScorer
from hfprune_dist.structures import EXPERTS as WHOLE
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.experts import mlp_widths
from hfprune_dist.structures.kept import Shape

README = Path(__file__).parents[2] / "hfprune_dist" / "checkpoints" / "README.md"
WINDOWS = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
# Shares that are kept: of the dense model, and then of the result.
SHARES = {NEURONS: (2 / 3, 1 / 2), WHOLE: (3 / 4, 2 / 3)}
every_family = pytest.mark.parametrize("model_type", EXPERTS)
every_mixture = pytest.mark.parametrize("model_type", EXPERTS | MORE_EXPERTS)
further = pytest.mark.parametrize("model_type", MORE_EXPERTS)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A family's checkpoint, shared by all tests of one kind of unit; with more experts where experts go."""

    @functools.cache
    def made(name, structure=NEURONS):
        changes = MORE_EXPERTS.get(name, {}) | (with_experts(name, 8) if structure == WHOLE else {})
        checkpoint = open_checkpoint(save_model(tmp_path_factory.mktemp(name) / "model", name, **changes))
        require_own_weights(checkpoint)
        return checkpoint

    return made


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits_of(model):
    return model(input_ids=WINDOWS, use_cache=False).logits


def routing_of(model):
    """Return the sorted experts of each token, in every layer that has some [tokens, chosen]."""
    chosen = []
    for experts in (it for it in model.modules() if hasattr(it, "_apply_gate")):
        experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].sort().values))
    logits_of(model)
    return chosen


def gone_of(units, kept, layer):
    """Return which units of a layer go, for each expert [experts, units of it]."""
    gone_U = torch.ones(units.counts[layer], dtype=torch.bool)
    gone_U[kept.of_layer(layer, units.kind)] = False
    return gone_U.view(units.parts, -1)


def never_chosen(layer, gone_E):
    """Keep a layer's router from choosing these experts: set their logits and corrected scores to -inf."""
    router = next(it for name, it in layer.named_modules() if name.rpartition(".")[2] in ("gate", "router"))
    compute, linear = router.forward, torch.nn.functional.linear
    without = partial(torch.masked_fill, mask=gone_E, value=float("-inf"))

    def forward(hidden, *corrections):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", lambda *inputs: without(linear(*inputs)))
            return compute(hidden, *map(without, corrections))

    for name, bias in router.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            bias[..., gone_E] = float("-inf")
    router.forward = forward


def masked(checkpoint, kept):
    """Return the dense model with zero outputs of neurons that go, and a router that never chooses experts that go."""
    model = dense_of(checkpoint)
    for layer, rows in zip(kept.layers, kept.units.get(WHOLE, ()), strict=False):
        if len(rows):
            never_chosen(model.model.layers[layer], gone_of(checkpoint.structures[WHOLE], kept, layer).flatten())
    if WHOLE in kept.units:
        return model
    for kind in kept.units:
        units = checkpoint.structures[kind]
        for layer in (it for it, count in enumerate(units.counts) if count):
            module = model.get_submodule(units.tensor(layer, units.output))
            gone_EN = gone_of(units, kept, layer)
            if kind != "expert_neurons":
                module.weight.data[:, gone_EN[0].repeat_interleave(units.channels_per_unit)] = 0
            elif getattr(module, "is_transposed", False):
                module.down_proj.data[gone_EN] = 0
            else:
                module.down_proj.data.transpose(1, 2)[gone_EN] = 0
    return model


def as_modules_have_it(folder, target, model_type):
    """Write the same checkpoint with all experts of a layer in one tensor."""
    load(folder).save_pretrained(target, save_original_format=False)
    tiny_tokenizer().save_pretrained(target)
    return open_checkpoint(target)


def test_the_readme_lists_what_is_covered(checkpoint_of):
    section = README.read_text().partition("### Mixtures of experts")[2].partition("\n###")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    listed = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert listed.keys() == (EXPERTS | MORE_EXPERTS).keys()
    for name, (_, neurons, beside, whole, groups) in listed.items():
        kinds = checkpoint_of(name).structures
        grouped = {"n_group", "num_expert_group"} & checkpoint_of(name).config.keys()
        assert ("each group" in whole) == bool(grouped) and WHOLE in kinds, name
        assert groups.strip().startswith("no: " if checkpoint_of(name).family.whole_groups else "yes"), name
        assert ("shared" in beside) == ("shared_neurons" in kinds)
        assert ("without" in neurons) == ("neurons" in kinds), name


def as_numbered(checkpoint, kept, routing):
    """Translate the experts of each token from a pruned checkpoint's numbers to those of the dense one."""
    if WHOLE not in kept.units:
        return routing
    sparse = [kept.of_layer(layer, WHOLE) for layer in checkpoint.family.experts.layers]
    return [rows[chosen].sort().values for rows, chosen in zip(sparse, routing, strict=True)]


def assert_pruned_is_masked(checkpoint, kept, folder):
    assert is_plain(checkpoint, kept.shape)
    write(checkpoint, kept, folder)
    smaller, loaded, dense = open_checkpoint(folder), load(folder), masked(checkpoint, kept)
    require_own_weights(smaller)
    assert type(loaded).__module__.startswith("transformers.")
    assert_same(logits_of(loaded), logits_of(dense))
    routing = as_numbered(checkpoint, kept, routing_of(loaded))
    assert len(routing) == len(checkpoint.family.experts.layers)
    assert all(torch.equal(*pair) for pair in zip(routing, routing_of(dense), strict=True))
    parameters = {it.data_ptr(): it.numel() for it in loaded.state_dict().values()}
    assert smaller.parameters == checkpoint.parameter_counts.of(kept.shape) == sum(parameters.values())
    fields = {field for units in checkpoint.structures.values() for field in units.fields}
    assert {key for key, value in checkpoint.config.items() if smaller.config[key] != value} <= fields
    stated = loaded.config.to_dict()
    assert all(smaller.config[key] == stated[key] for key in fields & stated.keys())


@every_family
@pytest.mark.parametrize(
    ("fused", "structure", "groups"),
    [
        (False, NEURONS, False),
        (True, NEURONS, False),
        (False, NEURONS, True),
        (False, WHOLE, False),
        (True, WHOLE, False),
    ],
)
def test_a_pruned_checkpoint_is_the_masked_model(checkpoint_of, tmp_path, model_type, fused, structure, groups):
    checkpoint = checkpoint_of(model_type, structure)
    if fused:
        checkpoint = as_modules_have_it(checkpoint.path, tmp_path / "fused", model_type)
        require_own_weights(checkpoint)
        assert not checkpoint.family.experts.each
    kept = some_kept(checkpoint, SHARES[structure][0], structure, groups=groups and not checkpoint.family.whole_groups)
    assert_pruned_is_masked(checkpoint, kept, tmp_path / "pruned")


def test_a_list_of_equal_numbers_is_one(checkpoint_of, tmp_path):
    """Files of hunyuan_v1_moe have an entry for each layer."""
    shutil.copytree(checkpoint_of("hunyuan_v1_moe").path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"moe_topk": [2] * 3, "moe_intermediate_size": [24] * 3}))
    checkpoint = open_checkpoint(tmp_path / "model")
    require_own_weights(checkpoint)
    assert_pruned_is_masked(checkpoint, some_kept(checkpoint, 2 / 3), tmp_path / "pruned")
    file.write_text(json.dumps(config | {"moe_topk": [2, 1, 2]}))
    with pytest.raises(
        UserError, match=r"moe_topk must be an integer from 1 to 4, the number of experts, not \[2, 1, 2\]"
    ):
        open_checkpoint(tmp_path / "model")


@further
@pytest.mark.parametrize("structure", [NEURONS, WHOLE])
def test_what_is_around_experts_computes_the_same(checkpoint_of, tmp_path, model_type, structure):
    checkpoint = checkpoint_of(model_type, structure)
    kept = some_kept(checkpoint, SHARES[structure][0], structure)
    assert_pruned_is_masked(checkpoint, kept, tmp_path / "pruned")


@pytest.mark.parametrize("model_type", ["phimoe", "lfm2_moe", "kimi_linear"])
def test_files_may_have_what_modules_have(checkpoint_of, tmp_path, model_type):
    checkpoint = as_modules_have_it(checkpoint_of(model_type).path, tmp_path / "fused", model_type)
    require_own_weights(checkpoint)
    assert not checkpoint.family.experts.each and not checkpoint.names.pairs
    assert_pruned_is_masked(checkpoint, some_kept(checkpoint, 2 / 3), tmp_path / "pruned")


@every_mixture
def test_config_json_alone_tells_the_neurons_of_each_layer(checkpoint_of, model_type):
    checkpoint = checkpoint_of(model_type)
    counts = zip(*(it.counts for it in checkpoint.pruned_kinds([NEURONS])), strict=True)
    assert [stored for _, stored in mlp_widths(checkpoint.config)] == [sum(layer) for layer in counts]


def test_files_may_list_the_layers_with_experts_as_numbers(checkpoint_of, tmp_path):
    shutil.copytree(checkpoint_of("mimo_v2_flash").path, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("mlp_layer_types") == ["dense", "sparse", "sparse"]
    file.write_text(json.dumps(config | {"moe_layer_freq": [0, 1, 1]}))
    checkpoint = open_checkpoint(tmp_path / "model")
    assert mlp_widths(checkpoint.config) == mlp_widths(checkpoint_of("mimo_v2_flash").config)
    require_own_weights(checkpoint)
    file.write_text(json.dumps(config | {"moe_layer_freq": [0, 1]}))
    with pytest.raises(UserError, match="it can't be read as one of a mimo_v2_flash"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("model_type", ["cohere2_moe", "minimax_m3_vl_text"])
def test_widths_of_layers_without_experts_count_in_what_is_left(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    kept = some_kept(checkpoint, 2 / 3)
    write(checkpoint, kept, tmp_path / "pruned")
    assert mlp_widths(open_checkpoint(tmp_path / "pruned").config) != mlp_widths(checkpoint.config)


def scorer_of(checkpoint, world):
    kinds = [it.kind for it in checkpoint.pruned_kinds([NEURONS])]
    options = {"seed": 0, "micro_batch_size": 1, "world": world, "structures": [*kinds, WHOLE]}
    options["sharding"] = "zero3" if world.size > 1 else "replicate"
    return ShardScorer(checkpoint, torch.float32, WINDOWS, [CRITERIA["entropy"]], **options)


@further
def test_scores_are_those_that_are_defined(checkpoint_of, model_type):
    checkpoint, model = checkpoint_of(model_type), dense_of(checkpoint_of(model_type))
    units = {it.kind: it for it in checkpoint.pruned_kinds([NEURONS])}
    others = {
        (kind, layer): it.tensor(layer, it.output)
        for kind, it in units.items()
        for layer, count in enumerate(it.counts)
        if kind != KIND and count
    }
    expected = definition(model, WINDOWS[:2], "entropy", others=others)
    assert {layer for kind, layer in expected if kind == KIND} == {*experts_of(model)}
    sums = scorer_of(checkpoint, SoloWorld()).score([range(2)]).kinds
    for (kind, layer), expected_U in expected.items():
        ours_U = sums[kind].exact["entropy"][layer, : len(expected_U)]
        assert (ours_U - expected_U).norm() <= 1e-4 * expected_U.norm(), (kind, layer)


@pytest.mark.parametrize(
    ("model_type", "fused", "groups"),
    [
        *((name, False, True) for name in EXPERTS | MORE_EXPERTS),
        # One tensor for all experts: alone, next to shared ones, transposed.
        *((name, True, False) for name in ("mixtral", "glm4_moe", "gpt_oss")),
    ],
)
def test_a_refit_lowers_the_error(checkpoint_of, tmp_path, model_type, fused, groups):
    """Both the error of every layer's output on the calibration text, and the model's."""
    checkpoint, windows_ST = checkpoint_of(model_type), torch.cat([WINDOWS, WINDOWS.flip(1), WINDOWS.roll(1, 1)])
    if fused:
        checkpoint = as_modules_have_it(checkpoint.path, tmp_path / "fused", model_type)
    kept = some_kept(checkpoint, 2 / 3, groups=groups and not checkpoint.family.whole_groups)
    options = {"world": SoloWorld(), "windows_ST": windows_ST, "micro_batch_size": 6}
    fitted = refit("dense", checkpoint, kept, tmp_path / "refit", **options)
    write(checkpoint, kept, tmp_path / "cut")
    write(checkpoint, kept, tmp_path / "fitted", fitted.replacements(kept.layers))
    before, after = (errors_of_layers(checkpoint, tmp_path / it, windows_ST) for it in ("cut", "fitted"))
    assert all(now < 0.95 * then for now, then in zip(after, before, strict=True)), (after, before)
    for number, report in enumerate(fitted.reports(kept.layers)):
        assert report.keys() == {kind for kind, rows in kept.units.items() if len(rows[number])}
        assert all(it.error_after < it.error_before for it in report.values())
    dense, (cut, better) = dense_of(checkpoint), (load(tmp_path / it) for it in ("cut", "fitted"))
    assert type(better).__module__.startswith("transformers.")
    if model_type != "minimax":  # its layers amplify the first ones' losses by more than a refit recovers
        assert divergence(dense, better) < divergence(dense, cut)


@torch.no_grad()
def divergence(dense, other):
    log_p, log_q = (logits_of(it).log_softmax(-1) for it in (dense, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def errors_of_layers(checkpoint, folder, windows_ST):
    """Return the share of each layer's output that is lost when the layer reads the dense model's states."""
    dense, pruned = (LayerReader(it, torch.float32, CPU) for it in (checkpoint, open_checkpoint(folder)))
    hidden_BTC, errors = dense.embed({0: windows_ST})[0], []
    for number in range(checkpoint.num_layers):
        output_BTC = run(dense.layer(number), hidden_BTC)
        lost_BTC = run(pruned.layer(number), hidden_BTC) - output_BTC
        errors.append(float(lost_BTC.square().sum() / output_BTC.square().sum()))
        hidden_BTC = output_BTC
    return errors


@every_family
def test_kv_groups_go_where_they_can_and_others_are_refused_by_name(checkpoint_of, model_type):
    checkpoint = checkpoint_of(model_type)
    method = Method(criterion="entropy", structures=["neurons", "kv_groups"], allocation="local")
    if not checkpoint.family.whole_groups:
        check_ratios(checkpoint, [0.1], method, "here")
        return
    with pytest.raises(
        UserError, match=f"here: {model_type} has KV groups that can't be pruned .*(has something|keeps one)"
    ):
        check_ratios(checkpoint, [0.1], method, "here")
    (remark,) = remarks_on_shapes(checkpoint, [0.1], method.model_copy(update={"adapts": True}), "here")
    assert remark.startswith("here: KV groups stay: ")


@every_family
def test_what_chooses_experts_stays_byte_for_byte(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    write(checkpoint, some_kept(checkpoint, 2 / 3), tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.path, tmp_path))
    owned = {
        name
        for units in checkpoint.pruned_kinds([NEURONS])
        for layer in range(3)
        for name, _ in units.in_layer(layer, checkpoint.tensors)
    }
    assert before.keys() == after.keys() and any("gate.weight" in it or "router" in it for it in before.keys() - owned)
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - owned)
    assert all(before[name].shape != after[name].shape for name in owned)


@every_family
@pytest.mark.parametrize("fused", [False, True])
def test_what_chooses_experts_follows_them_bit_by_bit(checkpoint_of, tmp_path, model_type, fused):
    checkpoint = checkpoint_of(model_type, WHOLE)
    if fused:
        checkpoint = as_modules_have_it(checkpoint.path, tmp_path / "fused", model_type)
    kept = some_kept(checkpoint, SHARES[WHOLE][0], WHOLE)
    write(checkpoint, kept, tmp_path / "pruned")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.path, tmp_path / "pruned"))
    expected = {}
    for name, tensor in before.items():
        layer = re.search(r"\.layers\.(\d+)\.(?!self_attn)", name)
        rows = kept.of_layer(int(layer[1]), WHOLE).tolist() if layer else []
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if not expert:
            expected[name] = tensor[rows] if rows and len(tensor) == 8 else tensor
        elif int(expert[1]) in rows:
            expected[name.replace(expert[0], f".experts.{rows.index(int(expert[1]))}.")] = tensor
    assert expected.keys() == after.keys() and all(torch.equal(after[name], it) for name, it in expected.items())
    changed = {name for name, it in before.items() if name in after and after[name].shape != it.shape}
    assert sum(".gate." in it or ".router." in it for it in changed) >= len(checkpoint.family.experts.layers)


@every_family
@pytest.mark.parametrize("structures", [(WHOLE, NEURONS), (NEURONS, WHOLE)])
def test_experts_go_before_or_after_neurons(checkpoint_of, tmp_path, model_type, structures):
    first, second = structures
    checkpoint = checkpoint_of(model_type, WHOLE)
    write(checkpoint, some_kept(checkpoint, SHARES[first][0], first), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    kept = some_kept(once, SHARES[second][0], second)
    write(once, kept, tmp_path / "twice")
    twice = open_checkpoint(tmp_path / "twice")
    assert_same(logits_of(load(twice.path)), logits_of(masked(once, kept)))
    assert is_plain(twice, Shape(tuple(range(3)))) and twice.parameters == once.parameter_counts.of(kept.shape)


@every_mixture
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_layer_after_layer_is_the_whole_model(checkpoint_of, model_type, dtype):
    checkpoint = checkpoint_of(model_type)
    model = dense_of(checkpoint) if dtype == torch.float32 else load(checkpoint.path, dtype)
    through_layers(checkpoint, model, WINDOWS)


@every_mixture
def test_lora_trains_and_merges_and_leaves_experts_as_they_are(checkpoint_of, tmp_path, model_type):
    checkpoint = checkpoint_of(model_type)
    model = trained_and_merged(checkpoint, tmp_path, WINDOWS)
    ours, theirs = logits_of(load(tmp_path / "merged")), logits_of(model)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint.path, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {checkpoint.names.in_modules(name) for name in changed} == set(read_adapter(tmp_path / "adapter").factors)
    saved = PeftModel.from_pretrained(dense_of(checkpoint), tmp_path / "adapter")
    assert torch.equal(logits_of(saved.eval()), theirs)


@every_mixture
@torch.no_grad()
def test_pairs_share_a_row_of_training_where_they_do_not_see_each_other(checkpoint_of, model_type):
    checkpoint = checkpoint_of(model_type)
    model = load_causal_lm(checkpoint.path, torch.float32)
    alone = torch.cat([model(input_ids=WINDOWS[:1, part]).logits for part in (slice(0, 5), slice(5, 12))], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    together = model(input_ids=WINDOWS[:1], position_ids=positions, use_cache=False).logits
    if checkpoint.family.keeps_apart:
        assert_same(together, alone)
    else:
        assert (together - alone).abs().max() > 1e-2 * alone.abs().max()


def test_two_ranks_have_the_bits_of_one(checkpoint_of, tmp_path):
    checkpoints = {name: checkpoint_of(name) for name in EXPERTS | MORE_EXPERTS}
    assert_two_ranks_have_the_bits_of_one(checkpoints, scorer_of, tmp_path, shards=(range(2), range(2, 4)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"quantization_config": "awq"}, "quantized weights can't be pruned; use the unquantized checkpoint"),
        ({"quantization_config": [1, 2]}, "quantized weights can't be pruned; use the unquantized checkpoint"),
        ({"model_type": None}, "model_type is None; it must name an architecture"),
    ],
)
def test_nonsense_in_config_json_is_refused(checkpoint_of, tmp_path, changes, why):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of("glm4_moe").path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=re.escape(why)):
        open_checkpoint(folder)


def test_code_that_came_with_a_checkpoint_is_left_behind(checkpoint_of, tmp_path):
    shutil.copytree(checkpoint_of("qwen3_moe").path, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    told = {"auto_map": {"AutoConfig": "configuration_theirs.TheirConfig"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | told))
    (tmp_path / "model" / "configuration_theirs.py").write_text("raise SystemExit\n")
    checkpoint = open_checkpoint(tmp_path / "model")
    write(checkpoint, some_kept(checkpoint, 2 / 3), tmp_path / "pruned")
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert not list((tmp_path / "pruned").glob("*.py"))


def test_tensors_that_files_call_otherwise_are_not_made_up(checkpoint_of, tmp_path):
    """Experts of one architecture under the names of another, which loading would leave at random."""
    shutil.copytree(checkpoint_of("olmoe").path, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    told = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | told))
    with pytest.raises(UserError, match=r"its files lack .*experts.*, or call it something else than mixtral does"):
        load_causal_lm(tmp_path / "model", torch.float32)

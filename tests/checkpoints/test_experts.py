"""Every mixture of experts that can be pruned, compared with transformers on a tiny model of it."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from families import MIXTURES, SEEING_EXPERTS, save_model, with_experts
from families_masked import WINDOWS, dense_of, load, logits_of, masked, pruned_plainly, through_layers
from masking import write
from mixtures import KIND, definition, experts_of, some_kept
from ranks import SoloWorld
from refitting import refit
from shapes import divergence
from tiny import edit_json, tiny_tokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.loading import require_own_weights
from hfprune_dist.scoring.shard_scorer import ShardScorer
from hfprune_dist.structures import EXPERTS as WHOLE
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.score_names import score_name

# Shares that are kept: of the dense model, and then of the result.
SHARES = {NEURONS: (2 / 3, 1 / 2), WHOLE: (3 / 4, 2 / 3)}
every_mixture = pytest.mark.parametrize("model_type", MIXTURES)
# Those with one tensor for all experts: alone, next to shared ones, transposed; and other names in files.
FUSED = ("mixtral", "glm4_moe", "gpt_oss", "phimoe", "lfm2_moe", "kimi_linear")


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A family's checkpoint, shared by all tests; with as many experts as let some go."""

    @functools.cache
    def made(name):
        changes = MIXTURES[name] | with_experts(name, 8) if name in MIXTURES else {}
        checkpoint = open_checkpoint(save_model(tmp_path_factory.mktemp(name) / "model", name, **changes))
        require_own_weights(checkpoint)
        return checkpoint

    return made


def routing_of(model):
    """Return the sorted experts of each token, in every layer that has some [tokens, chosen]."""
    chosen = []
    for experts in (module for module in model.modules() if hasattr(module, "_apply_gate")):
        experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].sort().values))
    logits_of(model)
    return chosen


def as_modules_have_it(checkpoint, target):
    """Write the same checkpoint with all experts of a layer in one tensor."""
    load(checkpoint.path).save_pretrained(target, save_original_format=False)
    tiny_tokenizer().save_pretrained(target)
    fused = open_checkpoint(target)
    require_own_weights(fused)
    assert not fused.family.experts.has_own_tensors and not fused.names.pairs
    return fused


def as_numbered(checkpoint, kept, routing):
    """Translate the experts of each token from a pruned checkpoint's numbers to those of the dense one."""
    if WHOLE not in kept.units:
        return routing
    sparse = [kept.of_layer(layer, WHOLE) for layer in checkpoint.family.experts.layers]
    return [rows[chosen].sort().values for rows, chosen in zip(sparse, routing, strict=True)]


def assert_pruned_is_masked(checkpoint, kept, folder):
    smaller, loaded = pruned_plainly(checkpoint, kept, folder)
    routing = as_numbered(checkpoint, kept, routing_of(loaded))
    assert len(routing) == len(checkpoint.family.experts.layers)
    assert all(torch.equal(*pair) for pair in zip(routing, routing_of(masked(checkpoint, kept)), strict=True))
    return smaller


@every_mixture
@pytest.mark.parametrize("structure", [NEURONS, WHOLE])
def test_a_pruned_checkpoint_is_the_masked_model(checkpoint_of, tmp_path, model_type, structure):
    """With KV groups, next to neurons, where they can go."""
    checkpoint = checkpoint_of(model_type)
    groups = structure == NEURONS and not checkpoint.family.whole_groups
    kept = some_kept(checkpoint, SHARES[structure][0], structure, groups=groups)
    assert_pruned_is_masked(checkpoint, kept, tmp_path / "pruned")


@pytest.mark.parametrize("model_type", FUSED)
@pytest.mark.parametrize("structure", [NEURONS, WHOLE])
def test_files_may_have_what_modules_have(checkpoint_of, tmp_path, model_type, structure):
    checkpoint = as_modules_have_it(checkpoint_of(model_type), tmp_path / "fused")
    kept = some_kept(checkpoint, SHARES[structure][0], structure)
    assert_pruned_is_masked(checkpoint, kept, tmp_path / "pruned")


@pytest.mark.parametrize("structures", [(WHOLE, NEURONS), (NEURONS, WHOLE)])
def test_experts_go_before_or_after_neurons(checkpoint_of, tmp_path, structures):
    first, second = structures
    checkpoint = checkpoint_of("deepseek_v3")
    write(checkpoint, some_kept(checkpoint, SHARES[first][0], first), tmp_path / "once")
    once = open_checkpoint(tmp_path / "once")
    assert_pruned_is_masked(once, some_kept(once, SHARES[second][0], second), tmp_path / "twice")


def test_lists_in_files_are_read(checkpoint_of, tmp_path):
    """Files of hunyuan_v1_moe have an entry for each layer, those of mimo_v2_flash numbers for layers with experts."""
    for name, gone, told in (
        ("hunyuan_v1_moe", "moe_topk", {"moe_topk": [2] * 3, "moe_intermediate_size": [24] * 3}),
        ("mimo_v2_flash", "mlp_layer_types", {"moe_layer_freq": [0, 1, 1]}),
    ):
        folder = tmp_path / name
        shutil.copytree(checkpoint_of(name).path, folder)
        edit_json(folder / "config.json", gone, **told)
        checkpoint = open_checkpoint(folder)
        assert_pruned_is_masked(checkpoint, some_kept(checkpoint, 2 / 3), tmp_path / f"{name} pruned")


@pytest.mark.parametrize("model_type", MIXTURES | SEEING_EXPERTS)
def test_scores_and_single_layers_are_those_of_the_whole_model(checkpoint_of, model_type):
    checkpoint, model = checkpoint_of(model_type), dense_of(checkpoint_of(model_type))
    through_layers(checkpoint, dense_of(checkpoint), WINDOWS)
    units = {own.kind: own for own in checkpoint.pruned_kinds([NEURONS])}
    others = {
        (kind, layer): own.tensor(layer, own.output)
        for kind, own in units.items()
        for layer, count in enumerate(own.counts)
        if kind != KIND and count
    }
    expected = definition(model, WINDOWS[:1], "entropy", others=others)
    assert {layer for kind, layer in expected if kind == KIND} == {*experts_of(model)}
    options = {"seed": 0, "world": SoloWorld(), "structures": [*units, WHOLE]}
    scorer = ShardScorer(checkpoint, torch.float32, WINDOWS, [CRITERIA["entropy"]], **options)
    sums = scorer.score([range(1)])
    for (kind, layer), expected_U in expected.items():
        ours_U = sums[score_name(layer, "entropy", kind)]
        assert (ours_U - expected_U).norm() <= 1e-4 * expected_U.norm(), (kind, layer)


# With a tensor for each expert or one for all, and with shared experts.
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_refit_lowers_the_error(checkpoint_of, tmp_path, model_type):
    checkpoint, windows_ST = checkpoint_of(model_type), torch.cat([WINDOWS, WINDOWS.flip(1), WINDOWS.roll(1, 1)])
    kept = some_kept(checkpoint, 2 / 3, groups=not checkpoint.family.whole_groups)
    options = {"world": SoloWorld(), "windows_ST": windows_ST, "micro_batch_size": 6}
    fitted = refit("dense", checkpoint, kept, tmp_path / "refit", **options)
    write(checkpoint, kept, tmp_path / "cut")
    write(checkpoint, kept, tmp_path / "fitted", fitted.replacements(kept.layers))
    cut, better = (divergence(dense_of(checkpoint), load(tmp_path / name), WINDOWS) for name in ("cut", "fitted"))
    assert better < cut

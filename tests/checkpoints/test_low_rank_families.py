"""LoRAP on architectures whose attention has separate projections, against dense models; others are refused."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from families import save_model
from families_lora import trained_and_merged
from families_masked import WINDOWS, assert_same, dense_of, load, logits_of, through_layers
from masking import write
from ranks import SoloWorld

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.token_costs import token_costs
from hfprune_dist.config.method import Method
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.errors import UserError
from hfprune_dist.models.loading import load_causal_lm, require_own_weights
from hfprune_dist.planning.ratios import check_ratios
from hfprune_dist.planning.shapes import shape_for
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.low_rank import compress_layers
from hfprune_dist.refit.refitted_layers import RefittedLayers

RATIO = 0.45  # low enough that no matrix of attention stays whole
METHOD = Method(criterion="lorap", allocation="low_rank")
# Architecture -> reason why it is refused.
REFUSED = {
    "phi3": "its queries, keys and values are one matrix",
    "lfm2": "not all layers have attention (layer 0 has none)",
    "gemma4_text": "its layers differ in heads",
    "youtu": "its attention keeps one latent vector for all heads",
    "mixtral": "allocation: low_rank isn't possible; valid: uniform, local",
    "llava": "is a vision-language model, which must stay plain",
}
# One for each kind of norms, MLP, biases and names.
every_kind = pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "cohere", "glm4", "phi", "opt", "biogpt", "nemotron"]
)


@pytest.fixture(scope="module")
def cut_of(tmp_path_factory):
    """A family's model, the result of LoRAP's pass and its checkpoint; shared by all tests."""

    @functools.cache
    def cut(model_type):
        folder = tmp_path_factory.mktemp(model_type)
        dense = open_checkpoint(save_model(folder / "dense", model_type))
        check_ratios(dense, [RATIO], METHOD, "m")
        shape = shape_for(Target(dense, RATIO, "m", allocation="low_rank"))
        ranks = {name: row[0] for name, row in shape.ranks.items()}
        layers = RefittedLayers(dense, folder / "layers")
        stream = LayerStream(dense, WINDOWS, torch.float32, 2, SoloWorld())
        kept = compress_layers(dense, shape, stream, layers, lambda _done: None)
        write(dense, kept, folder / "low", layers.replacements(kept.layers))
        return SimpleNamespace(dense=dense, kept=kept, ranks=ranks, low=open_checkpoint(folder / "low"))

    return cut


def read_by(model, names):
    """Return d of modules' inputs: of each channel, the root of the mean over windows of its sum of squares."""
    read = {}

    def observe(name, _module, inputs):
        read[name] = inputs[0].double().reshape(len(WINDOWS), -1, inputs[0].shape[-1]).square().sum(1).mean(0).sqrt()

    handles = [
        model.get_submodule(name).register_forward_pre_hook(functools.partial(observe, name)) for name in {*names}
    ]
    logits_of(model)
    for handle in handles:
        handle.remove()
    return [read[name] for name in names]


def truncated(weight, read, rank):
    """Return the product of LoRAP's factors."""
    left, values, right = torch.linalg.svd(weight.double() * read, full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank] / read).to(weight.dtype)


def defined(dense, ranks, width):
    """The dense model with products for attention's matrices and zeros for neurons that go, and the neurons that stay.

    The whole model runs once per layer, so that every layer reads the outputs of layers that are already changed.
    """
    model, units, kept = dense_of(dense), dense.units, []
    attention = [f"{dense.family.attention}.{name}" for name in dense.family.attention_projections]
    for layer in range(3):
        query, output = (units.tensor(layer, part) for part in (attention[0], attention[3]))
        names = [units.tensor(layer, part) for part in units.weights]
        row, down = (names[place].removesuffix(".weight") for place in (0, -1))
        of_query, of_output, of_row, of_down = read_by(model, [query, output, row, down])
        rows = [model.get_parameter(name).data.double() for name in names[:-1]]
        matrices = [matrix for whole in rows for matrix in whole.chunk(2 if len(whole) > len(of_down) else 1)]
        columns = model.get_submodule(down).weight.data
        scores = sum((matrix * of_row).norm(dim=1) for matrix in matrices) + columns.double().norm(dim=0) * of_down
        kept.append(scores.argsort()[len(scores) - width :].sort().values)
        columns[:, torch.ones(len(scores), dtype=torch.bool).index_fill_(0, kept[-1], False)] = 0
        for name, rank in ranks.items():
            linear = model.get_submodule(units.tensor(layer, name))
            linear.weight.data = truncated(linear.weight.data, of_output if name == attention[3] else of_query, rank)
    return model, kept


@every_kind
def test_what_is_written_loads_with_its_code_and_without_and_computes_what_lorap_defines(cut_of, model_type):
    cut = cut_of(model_type)
    assert len(cut.ranks) == 4 and cut.low.ranks == cut.kept.ranks and not cut.low.is_plain
    require_own_weights(cut.low)
    before, after = cut.dense.family, cut.low.family
    assert (before.whole_groups, before.no_sequence) == (after.whole_groups, after.no_sequence)
    expected, kept = defined(cut.dense, cut.ranks, cut.low.units.most)
    assert [row.tolist() for row in cut.kept.units["neurons"]] == [row.tolist() for row in kept]
    ours, theirs = load_causal_lm(cut.low.path, torch.float32), load(cut.low.path, trust_remote_code=True)
    assert torch.equal(logits_of(ours), logits_of(theirs))
    assert (logits_of(ours) - logits_of(expected)).abs().max() <= 1e-3 * logits_of(expected).abs().max()
    distinct = {weight.data_ptr(): weight.numel() for weight in ours.state_dict().values()}
    assert cut.low.parameters == cut.dense.parameter_counts.after(cut.kept.shape) == sum(distinct.values())


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "opt", "phi"])
def test_layers_costs_and_adapters_know_factors(cut_of, tmp_path, model_type):
    cut = cut_of(model_type)
    through_layers(cut.low, load_causal_lm(cut.low.path, torch.float32), WINDOWS)
    before, after = token_costs(cut.dense), token_costs(cut.low)
    assert before.multiplied - after.multiplied == cut.dense.parameters - cut.low.parameters
    assert before.cached_channels == after.cached_channels
    model = trained_and_merged(cut.low, tmp_path, WINDOWS)
    trained = {
        name.partition(".lora_B")[0] for name, weight in model.named_parameters() if ".lora_B" in name and weight.any()
    }
    factors = [f"{name}.{place}" for name in cut.ranks for place in (0, 1)]
    assert all(f"base_model.model.{cut.low.units.tensor(2, name)}" in trained for name in factors)
    assert_same(logits_of(load(tmp_path / "merged", trust_remote_code=True)), logits_of(model))


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_architectures_are_refused_by_name_while_planning(tmp_path, model_type):
    checkpoint = open_checkpoint(save_model(tmp_path / "model", model_type))
    with pytest.raises(UserError) as caught:
        check_ratios(checkpoint, [0.2], METHOD, f"{model_type} and lorap")
    assert model_type in str(caught.value) and REFUSED[model_type] in str(caught.value)

"""Checkpoints of ``families`` as transformers loads them, and their outputs once some of their parts are masked."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from families import ALL_SEEING
from masking import write
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.layer_settings import undroppable_layers
from hfprune_dist.checkpoints.pruned_config import is_plain
from hfprune_dist.models.loading import require_own_weights
from hfprune_dist.models.single_layer import LayerReader, run
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS
from hfprune_dist.structures.kept import Kept

WINDOWS = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model):
    return model(input_ids=WINDOWS, use_cache=False).logits


def load(folder, **options):
    sees = AutoConfig.from_pretrained(folder, **options).model_type in ALL_SEEING
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, **options).eval()


def dense_of(checkpoint):
    """Return the checkpoint's model, for the caller's own use; its files are read only once."""
    return copy.deepcopy(_loaded(checkpoint.path, is_plain=checkpoint.is_plain))


@functools.cache
def _loaded(folder, *, is_plain):
    return load(folder, trust_remote_code=not is_plain)


def kinds_of(checkpoint):
    """Return the kinds of units that can be pruned."""
    return ["neurons"] if checkpoint.family.whole_groups else ["neurons", "kv_groups"]


def two_layers(checkpoint):
    """Return two of three layers that can stay alone: the first, and the last unless the middle one must stay too."""
    return (0, 1) if 1 in undroppable_layers(checkpoint.config) else (0, 2)


def some_kept(checkpoint, layers, neurons):
    """Keep this many neurons in each of these layers, and only the second KV group where groups can go."""
    generator = torch.Generator().manual_seed(1)
    width = checkpoint.units.most
    units = {"neurons": [torch.randperm(width, generator=generator)[:count].sort().values for count in neurons]}
    if "kv_groups" in kinds_of(checkpoint):
        units["kv_groups"] = [torch.tensor([1])] * len(layers)
    return Kept(tuple(layers), units)


def masked(checkpoint, kept):
    """Return the dense model with zero outputs for every part that goes, and no expert chosen that goes."""
    model = dense_of(checkpoint)
    for number, layer in enumerate(checkpoint.family.layers_of(model)):
        if number not in kept.layers:
            layer.register_forward_hook(_skip)
            continue
        for kind in kept.units:
            units = checkpoint.structures[kind]
            gone_U = torch.ones(units.counts[number], dtype=torch.bool)
            gone_U[kept.of_layer(number, kind)] = False
            if kind == EXPERTS and len(gone_U):
                _never_chosen(layer, gone_U)
            elif len(gone_U):
                _silent(layer.get_submodule(units.output), gone_U, units)
    return model


def _silent(module, gone_U, units):
    """Zero the columns of an output projection, or of all experts', that read these units."""
    if units.kind != EXPERT_NEURONS:
        module.weight.data[:, gone_U.repeat_interleave(units.channels_per_unit)] = 0
    elif getattr(module, "is_transposed", False):
        module.down_proj.data[gone_U.view(units.parts, -1)] = 0
    else:
        module.down_proj.data.transpose(1, 2)[gone_U.view(units.parts, -1)] = 0


def _never_chosen(layer, gone_E):
    """Keep a layer's router from choosing these experts: set their logits and corrected scores to -inf."""
    router = next(module for name, module in layer.named_modules() if name.rpartition(".")[2] in ("gate", "router"))
    compute, linear = router.forward, torch.nn.functional.linear
    without = functools.partial(torch.masked_fill, mask=gone_E, value=float("-inf"))

    def forward(hidden, *corrections):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", lambda *inputs: without(linear(*inputs)))
            return compute(hidden, *map(without, corrections))

    for name, bias in router.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            bias[..., gone_E] = float("-inf")
    router.forward = forward


def _skip(_layer, inputs, output):
    """Return a layer's input as its output, either by itself or as the first of several."""
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


@torch.no_grad()
def through_layers(checkpoint, model, windows, tolerance=1e-6):
    """Take windows through a checkpoint's layers one at a time, and compare each with the model's own, bit for bit; and
    the head's logits with the model's, relative to the largest.
    """
    seen = []
    for layer in checkpoint.family.layers_of(model):
        layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0], output)))
    logits = model(input_ids=windows, use_cache=False).logits
    reader = LayerReader(checkpoint, model.dtype, torch.device("cpu"))
    hidden_BTC = reader.embed({0: windows})[0]
    for number, (expected, output) in enumerate(seen):
        assert torch.equal(hidden_BTC, expected), number
        hidden_BTC = run(reader.layer(number), hidden_BTC)
        assert torch.equal(hidden_BTC, output if isinstance(output, torch.Tensor) else output[0]), number
    ((_, logits_NV),) = reader.head().outputs(reader.final_norm()(hidden_BTC)).logits()
    assert (logits_NV - logits.flatten(0, 1).float()).abs().max() <= tolerance * logits.abs().max()


def pruned_plainly(checkpoint, kept, folder):
    """Write what is left, check that transformers' own class computes with it what the masked model does, and that no
    parameter is missing or idle; return the checkpoint and the model.
    """
    assert is_plain(checkpoint, kept.shape)
    write(checkpoint, kept, folder)
    smaller, loaded = open_checkpoint(folder), load(folder)
    require_own_weights(smaller)
    assert not list(folder.glob("*.py")) and type(loaded).__module__.startswith("transformers.")
    assert_same(logits_of(exact(copy.deepcopy(loaded))), logits_of(exact(masked(checkpoint, kept))), 1e-6)
    distinct = {weight.data_ptr(): weight.numel() for weight in loaded.state_dict().values()}
    assert smaller.parameters == checkpoint.parameter_counts.after(kept.shape) == sum(distinct.values())
    return smaller, loaded


def exact(model):
    """Have a model compute in double precision: how far single is from it depends on processors and multipliers."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # torch's grouped products know no doubles
    return model.double()


def assert_same(ours, theirs, tolerance=1e-5):
    """Check that logits differ by at most a small share of the largest."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()

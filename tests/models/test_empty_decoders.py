"""Decoders of one layer without values: copies of one for each configuration, which share nothing."""

import pytest
import torch
from families import save_model
from torch import nn

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models import single_layer
from hfprune_dist.models.single_layer import LAYER, LayerReader


def decoder(checkpoint, number, dtype=torch.float32):
    return LayerReader(checkpoint, dtype, torch.device("cpu"))._empty(number)


@pytest.mark.parametrize("model_type", ["gemma3", "bamba"])
def test_whatever_is_done_to_a_decoder_the_next_ones_are_as_if_it_were_the_first(tmp_path, monkeypatch, model_type):
    checkpoint = open_checkpoint(save_model(tmp_path, model_type))
    first, second = (decoder(checkpoint, 0) for _ in range(2))
    monkeypatch.setattr(single_layer, "_MADE", {})
    untouched = decoder(checkpoint, 0)
    monkeypatch.undo()
    for module in first.modules():
        module.register_forward_pre_hook(print)
        vars(getattr(module, "config", module))["spoilt"] = True
    for tensor in (*first.parameters(), *first.buffers()):
        tensor.requires_grad_(False).add_(1)
    first.set_submodule(LAYER, nn.Identity())
    for other in (second, decoder(checkpoint, 0)):
        assert str(other) == str(untouched)
        for ours in other.modules():
            assert not ours._forward_pre_hooks and not hasattr(getattr(ours, "config", ours), "spoilt")
        assert all(parameter.is_meta and parameter.requires_grad for parameter in other.parameters())
        assert all(map(torch.equal, other.buffers(), untouched.buffers()))

"""Decoders with one layer of a checkpoint each, whose parameters have no values yet."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.layer_settings import of_layers
from hfprune_dist.checkpoints.modeling_pruned import add_output_biases, config_of_layer, factorize
from hfprune_dist.models.loading import ONE_AT_A_TIME, attention_of, auto_class, name_outputs

# Name of the only layer in such a decoder.
LAYER = "layers.0"
# What a decoder is made from -> the decoder, for the most recent ones, whose copies take a quarter of the time.
_MADE: dict[str, nn.Module] = {}
_MOST = 8


class EmptyDecoders:
    """Makes decoders of one layer; those of layers with the same configuration are copies of one.

    Args:
        dtype: dtype of weights.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._config: Any = AutoConfig.from_pretrained(checkpoint.path)

    def of_layer(self, number: int) -> nn.Module:
        """A decoder that shares nothing with others; its parameters are meta tensors, its buffers lie on the CPU."""
        config = self._config_of(number)
        recipe = str([self._checkpoint.family.plain_class, self._dtype, config.to_dict()])
        with ONE_AT_A_TIME:
            if recipe not in _MADE:
                made = self._make(config)
                for old in list(_MADE)[: len(_MADE) + 1 - _MOST]:
                    del _MADE[old]
                _MADE[recipe] = made
            decoder = _MADE[recipe]
        return copy.deepcopy(decoder)

    def _make(self, config: Any) -> nn.Module:
        with torch.device("meta"):
            model = auto_class(self._checkpoint).from_config(
                config, dtype=self._dtype, attn_implementation=attention_of(self._checkpoint)
            )
            (layer,) = self._checkpoint.family.layers_of(model)
            add_output_biases(config.get_text_config(), layer)
            factorize(layer, config.get_text_config())
        body: nn.Module = self._checkpoint.family.body_of(model)
        for module in body.modules():
            _compute_buffers(model, module)
        return body

    def _config_of(self, number: int) -> Any:
        text = self._config.get_text_config()
        own = copy.deepcopy(config_of_layer(text, number))
        for key, value in of_layers(vars(own), [number]).items():
            setattr(own, key, value)
        own.use_cache = False
        name_outputs(own)
        if text is self._config:
            return own
        whole = copy.copy(self._config)
        whole.text_config = own
        return whole


def _compute_buffers(model: Any, module: nn.Module) -> None:
    """Compute a module's buffers as they are before weights (some of them buffers) are loaded: those of rotary
    embeddings from their configuration, others as transformers does it.
    """
    buffers = {name: it for name, it in module.named_buffers(recurse=False) if it.is_meta}
    if not buffers:
        return
    for name, buffer in buffers.items():
        in_files = name not in module._non_persistent_buffers_set
        empty = torch.empty_like(buffer, device="cpu")
        # NaN, so that a buffer that a class forgets shows.
        module.register_buffer(
            name, empty.fill_(torch.nan) if empty.is_floating_point() else empty, persistent=in_files
        )
    model._init_weights(module)

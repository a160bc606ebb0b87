"""Causal language models whose layers differ in heads and MLP widths, whose output projections have biases that their
architecture's don't, or whose attention has matrices of low rank; this file also travels inside such checkpoints.

It needs transformers alone: load such a checkpoint with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Heads and widths are in its config.json, under
``layer_sizes``: a field of the configuration -> its value in each layer. ``q_proj_rank`` there makes attention's
``q_proj`` two linear layers, one after the other, the first one of so many outputs. Projections with such biases are in
``output_biases``, by their names within a layer. vLLM reads each layer's heads under ``per_layer_config``.

``PrunedLlamaForCausalLM`` is made of ``LlamaForCausalLM`` when it is asked for, and so with every other architecture.
"""

import copy
import inspect
from typing import Any

import transformers
from torch import nn

_PRUNED, _RANK = "Pruned", "_rank"


def config_of_layer(config: Any, number: int) -> Any:
    """A copy of the configuration with the sizes of one layer."""
    every = getattr(config, "per_layer_config", None)  # a dict in versions of transformers that don't know this key
    own = copy.copy(config if every is None or isinstance(every, dict) else every[number])
    for field, values in (getattr(config, "layer_sizes", None) or {}).items():
        setattr(own, field, values[number])
    return own


def kind_of_layer(layer: Any, config: Any, number: int) -> dict[str, str]:
    """What a layer's class wants to know besides, where its layers are of several kinds and config.json lists them."""
    asks = "layer_type" in inspect.signature(type(layer).__init__).parameters
    return {"layer_type": config.layers_block_type[number]} if asks else {}


def add_output_biases(config: Any, layer: nn.Module) -> None:
    """Give projections of a layer the biases that the configuration says, with whatever values."""
    for name in getattr(config, "output_biases", None) or ():
        block, _, projection = name.rpartition(".")
        linear: Any = layer.get_submodule(name)
        setattr(layer.get_submodule(block), projection, nn.Linear(linear.in_features, linear.out_features))


def in_two(whole: Any, rank: int) -> nn.Sequential:
    """Two linear layers in place of one, the first one of so many outputs; a bias is the second's."""
    second = nn.Linear(rank, whole.out_features, bias=whole.bias is not None)
    return nn.Sequential(nn.Linear(whole.in_features, rank, bias=False), second)


def factorize(layer: Any, own: Any) -> None:
    """Make those projections of attention two linear layers that the configuration of the layer gives a rank."""
    ranks = [field for field in getattr(own, "layer_sizes", None) or {} if field.endswith(_RANK)]
    for field in ranks:
        attention = next(module for module in layer.modules() if hasattr(module, "q_proj"))
        name = field.removesuffix(_RANK)
        setattr(attention, name, in_two(getattr(attention, name), getattr(own, field)))


class SizesPerLayer:
    """Gives each decoder layer as many heads, an MLP as wide, and the biases that the configuration says for it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        body = self.base_model  # type: ignore[attr-defined]
        body = getattr(body, "decoder", body)
        for number, layer in enumerate(body.layers):
            own = config_of_layer(config, number)
            body.layers[number] = type(layer)(own, number, **kind_of_layer(layer, config, number))
            add_output_biases(config, body.layers[number])
            factorize(body.layers[number], own)
            for module in body.layers[number].modules():
                if getattr(module, "config", None) is own:
                    module.config = body.config  # the attention that is chosen later
        self.config = config

    def _get_static_cache_init_shape(self) -> None:
        """Static caches wait for the keys of each layer, since transformers takes all layers' for alike."""


def __getattr__(name: str) -> Any:
    plain = getattr(transformers, name.removeprefix(_PRUNED), None) if name.startswith(_PRUNED) else None
    if plain is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, type(name, (SizesPerLayer, plain), {"__module__": __name__}))

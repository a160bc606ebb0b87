"""Causal language models whose layers differ in heads and MLP widths; this file also travels inside such checkpoints.

It needs transformers alone: load such a checkpoint with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. Heads and widths are in its config.json, under
``layer_sizes``: a field of the configuration -> its value in each layer. Earlier versions wrote widths alone, under
``per_layer_config``.

``PrunedLlamaForCausalLM`` is made of ``LlamaForCausalLM`` when it is asked for, and so with every other architecture.
"""

import copy
from typing import Any

import transformers

_PRUNED = "Pruned"


def config_of_layer(config: Any, number: int) -> Any:
    """A copy of the configuration with the sizes of one layer."""
    own = copy.copy(config.per_layer_config[number])
    for field, values in (getattr(config, "layer_sizes", None) or {}).items():
        setattr(own, field, values[number])
    return own


class SizesPerLayer:
    """Gives each decoder layer as many heads, and an MLP as wide, as the configuration says for that layer."""

    def __init__(self, config: Any) -> None:
        sizes = getattr(config, "layer_sizes", None)
        super().__init__(config if sizes else config.per_layer_config[0])  # type: ignore[call-arg]
        body = self.model  # type: ignore[attr-defined]
        for number, layer in enumerate(body.layers):
            own = config_of_layer(config, number)
            body.layers[number] = type(layer)(own, number)
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

"""Causal language models whose layers have MLPs of different widths; this file also travels inside such checkpoints.

It needs transformers alone: load such a checkpoint with
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. The widths are in its config.json, under
``per_layer_config``.
"""

from typing import Any

from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM


class WidthPerLayer:
    """Gives each decoder layer an MLP as wide as the configuration says for that layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.per_layer_config[0])  # type: ignore[call-arg]
        for number, layer in enumerate(self.model.layers):  # type: ignore[attr-defined]
            layer.mlp = type(layer.mlp)(config.per_layer_config[number])
        self.config = config


class PrunedLlamaForCausalLM(WidthPerLayer, LlamaForCausalLM): ...  # type: ignore[misc]


class PrunedMistralForCausalLM(WidthPerLayer, MistralForCausalLM): ...  # type: ignore[misc]


class PrunedQwen2ForCausalLM(WidthPerLayer, Qwen2ForCausalLM): ...  # type: ignore[misc]


class PrunedQwen3ForCausalLM(WidthPerLayer, Qwen3ForCausalLM): ...  # type: ignore[misc]

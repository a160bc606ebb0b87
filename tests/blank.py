"""Checkpoints of any size without files, for everything that is computed from a config.json and tensor shapes."""

from __future__ import annotations

from typing import Any

import torch
from headers import checkpoint_of
from hypothesis import strategies as st
from tiny import SHAPE, VARIANTS
from transformers import PreTrainedModel

from hfprune_dist.checkpoints.checkpoint import Checkpoint

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def model_of(variant: str, **changes: object) -> PreTrainedModel:
    """Return transformers' model, whose weights have shapes but no data."""
    config_class, model_class, options = VARIANTS[variant]
    with torch.device("meta"):
        return model_class(config_class(**{**SHAPE, **options, **changes}))


def parameters_of(variant: str, **changes: object) -> int:
    """Return the number of its distinct parameters."""
    return sum(weight.numel() for weight in model_of(variant, **changes).parameters())


def blank(variant: str = "llama", **changes: object) -> Checkpoint:
    """Return the checkpoint of such a model."""
    config_class, model_class, options = VARIANTS[variant]
    told = {"model_type": config_class.model_type, "architectures": [model_class.__name__]}
    config: dict[str, Any] = {**told, **SHAPE, **options, **changes}
    shapes = {name: [*tensor.shape] for name, tensor in model_of(variant, **changes).state_dict().items()}
    return checkpoint_of(config, shapes)


@st.composite
def sizes(draw):
    """Draw the numbers of a config.json: a hidden size that few numbers of heads divide, one layer or many."""
    groups, queries = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12])), draw(st.integers(1, 3))
    return {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * queries,
        "hidden_size": groups * queries * draw(st.sampled_from([2, 4])),
        "intermediate_size": draw(st.integers(2, 300)),
        "num_hidden_layers": draw(st.integers(1, 12)),
        "vocab_size": draw(st.sampled_from([64, 1000])),
    }

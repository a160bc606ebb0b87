"""Checkpoints of any size without files, for everything that is computed from a config.json and tensor shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from tiny import SHAPE, VARIANTS

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import FAMILIES
from hfprune_dist.checkpoints.safetensors_header import TensorInfo

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


def parameters_of(variant: str, **changes: object) -> int:
    """Return the number of distinct parameters of transformers' model, whose weights have shapes but no data."""
    config_class, model_class, options = VARIANTS[variant]
    with torch.device("meta"):
        model = model_class(config_class(**{**SHAPE, **options, **changes}))
    return sum(weight.numel() for weight in model.parameters())


def blank(variant: str = "llama", **changes: object) -> Checkpoint:
    """Return the checkpoint of such a model."""
    config_class, _, options = VARIANTS[variant]
    stated = {**SHAPE, **options, **changes}
    config = {"model_type": config_class.model_type, **stated}
    family = FAMILIES[config_class.model_type]
    completed = family.completed(config)
    tensors = {name: TensorInfo("", "F32", _shape(name, completed), 0, 0) for name in sorted(family.tensors(config))}
    return Checkpoint(Path("none"), config, family, tensors)


def _shape(name: str, config: dict[str, int]) -> tuple[int, ...]:
    """Return a tensor's rows, and its columns unless it is a bias or a norm's weight."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries, keys = (config[key] * head_dim for key in ("num_attention_heads", "num_key_value_heads"))
    inner, vocabulary = config["intermediate_size"], config["vocab_size"]
    sides = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }
    module, part = name.split(".")[-2:]
    shape = sides.get(module, (hidden,))
    return shape[:1] if part == "bias" else shape


@st.composite
def sizes(draw):
    """Draw the numbers of a config.json: a hidden size that few numbers of heads divide, one layer or many."""
    groups, queries = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 12])), draw(st.integers(1, 3))
    return {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * queries,
        "hidden_size": groups * queries * draw(st.sampled_from([2, 4])),
        "intermediate_size": draw(st.integers(2, 300)),
        "num_hidden_layers": draw(st.integers(1, 32)),
        "vocab_size": draw(st.sampled_from([64, 1000])),
    }

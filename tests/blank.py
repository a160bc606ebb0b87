"""Checkpoints of any size without files, for everything that is computed from a config.json and tensor shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from tiny import SHAPE, VARIANTS

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.discovery import discover
from hfprune_dist.checkpoints.families import ATTENTION
from hfprune_dist.checkpoints.weight_files import TensorInfo

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
    config_class, model_class, options = VARIANTS[variant]
    told = {"model_type": config_class.model_type, "architectures": [model_class.__name__]}
    config: dict[str, Any] = {**told, **SHAPE, **options, **changes}
    shapes = _shapes(config)
    family, stated = discover(config, shapes, "blank")
    tensors = {name: TensorInfo("", "F32", shape, 0, 0) for name, shape in shapes.items()}
    return Checkpoint(Path("none"), config | stated, family, tensors)


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all tensors, a head even if it is tied."""
    hidden, inner, queries = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // queries
    keys = config.get("num_key_value_heads") or queries
    model_type, biased = config["model_type"], {*()}
    if config.get("attention_bias") or model_type == "qwen2":
        biased = {*ATTENTION} - ({"o_proj"} if model_type == "qwen2" else set())
    matrices = {
        "self_attn.q_proj": (queries * head_dim, hidden),
        "self_attn.k_proj": (keys * head_dim, hidden),
        "self_attn.v_proj": (keys * head_dim, hidden),
        "self_attn.o_proj": (hidden, queries * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    of_layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in matrices.items()}
    for name, shape in matrices.items():
        if name.partition(".")[2] in biased or (name.startswith("mlp.") and config.get("mlp_bias")):
            of_layer[f"{name}.bias"] = shape[:1]
    of_layer |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,))
    if model_type == "qwen3":
        of_layer |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (head_dim,))
    layers = range(config["num_hidden_layers"])
    shapes = {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in of_layer.items()}
    table = (config["vocab_size"], hidden)
    return {"model.embed_tokens.weight": table, **shapes, "model.norm.weight": (hidden,), "lm_head.weight": table}


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

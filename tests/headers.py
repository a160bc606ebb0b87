"""Mixtures of experts of any size, given by the names and shapes of their tensors, without files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.discovery import discover
from hfprune_dist.checkpoints.weight_files import TensorInfo

CONFIG = {
    "model_type": "new_moe",
    "architectures": ["NewMoeForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
ATTENTION = {"q_proj": [64, 64], "k_proj": [32, 64], "v_proj": [32, 64], "o_proj": [64, 64]}


@st.composite
def mixtures(draw: Any) -> dict[str, Any]:
    """Draw a config.json: experts; a shared one of its own width or of several experts', or none; dense layers."""
    layers = draw(st.integers(1, 4))
    shared = draw(
        st.sampled_from([{}, {"n_shared_experts": draw(st.integers(1, 3))}, {"shared_expert_intermediate_size": 40}])
    )
    return {
        **CONFIG,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(8, 300)),
        "moe_intermediate_size": draw(st.integers(9, 200)),
        "num_experts": (experts := draw(st.integers(2, 6))),
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "first_k_dense_replace": draw(st.integers(0, layers - 1)),
        **shared,
    }


@st.composite
def grouped_mixtures(draw: Any) -> dict[str, Any]:
    """Draw one with more experts, chosen by groups and corrected scores or by neither."""
    config = draw(mixtures())
    groups, of_group = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    chosen_groups = draw(st.integers(1, groups))
    routing = draw(st.sampled_from([{}, {"n_group": groups, "topk_group": chosen_groups}]))
    chosen = draw(st.integers(1, of_group * (chosen_groups if routing else 1)))
    return {**config, "num_experts": groups * of_group, "num_experts_per_tok": chosen, **routing}


def gated(name: str, width: int) -> dict[str, list[int]]:
    """Return the weights of an MLP."""
    rows = {f"{name}.{projection}.weight": [width, 64] for projection in ("gate_proj", "up_proj")}
    return rows | {f"{name}.down_proj.weight": [64, width]}


def tensors_of(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return name -> shape, for all tensors in the files of such a model."""
    width = config["moe_intermediate_size"]
    shared = config.get("shared_expert_intermediate_size") or config.get("n_shared_experts", 0) * width
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [1000, 64], "model.norm.weight": [64]}
    for layer in range(config["num_hidden_layers"]):
        parts = {f"{norm}.weight": [64] for norm in ("input_layernorm", "post_attention_layernorm")}
        parts |= {f"self_attn.{name}.weight": shape for name, shape in ATTENTION.items()}
        if layer < config["first_k_dense_replace"]:
            parts |= gated("mlp", config["intermediate_size"])
        else:
            parts["mlp.gate.weight"] = [config["num_experts"], 64]
            parts |= {"mlp.gate.e_score_correction_bias": [config["num_experts"]]} if "n_group" in config else {}
            parts |= gated("mlp.shared_experts", shared) if shared else {}
            for expert in range(config["num_experts"]):
                parts |= gated(f"mlp.experts.{expert}", width)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
    return shapes


def checkpoint_of(config: Mapping[str, Any], shapes: Mapping[str, list[int]] | None = None) -> Checkpoint:
    """Return the checkpoint whose files have these tensors; by default those of ``tensors_of``."""
    shapes = tensors_of(config) if shapes is None else shapes
    family, stated = discover(config, shapes, "here")
    infos = {name: TensorInfo("", "F32", tuple(shape), 0, 4 * math.prod(shape)) for name, shape in shapes.items()}
    return Checkpoint(Path("nowhere"), {**config, **stated}, family, infos)

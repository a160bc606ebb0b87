"""The attention and the norms of a model, found by the names and shapes of its layers' tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_dist.structures.units import LAYER_SIZES

Shapes = Mapping[str, Sequence[int]]

_OUTPUTS = ("o_proj", "out_proj", "dense")
_ATTENTION = re.compile(r"(self_attn|attention)\.")
# What layers have in place of it where attention is linear; short convolutions and state-space blocks are no attention.
_LINEAR_ATTENTION = "linear_attn"
# Linear layers of attention that LoRA leaves out: parts that choose keys get no gradient, and in a mixture of experts
# peft takes the names of MLPs' projections for those of experts.
_CHOOSING = ".indexer."
_OF_EXPERTS = re.compile(r"(gate|up|down)_proj")
# The norms of a layer: for attention and for the MLP, the norm before the block and the norm after it.
_NORMS: tuple[tuple[tuple[str | None, str | None], tuple[str | None, str | None]], ...] = (
    (("input_layernorm", None), ("post_attention_layernorm", None)),
    (("input_layernorm", None), ("pre_feedforward_layernorm", None)),
    (("input_layernorm", None), ("pre_ff_layernorm", None)),
    (("operator_norm", None), ("ffn_norm", None)),
    (("operator_norm", "post_operator_norm"), ("ffn_norm", "post_ffn_norm")),
    (("attention_layernorm", None), ("feedforward_layernorm", None)),
    ((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm")),
    (("input_layernorm", "post_attention_layernorm"), ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    (("input_layernorm", "post_attention_layernorm"), ("pre_mlp_layernorm", "post_mlp_layernorm")),
    (("input_layernorm", "post_norm1"), ("post_attention_layernorm", "post_norm2")),
    (("input_layernorm", "post_self_attn_layernorm"), ("post_attention_layernorm", "post_mlp_layernorm")),
)
# Architectures in which config.json can't set the size of a head; neither names nor shapes tell which these are.
_FIXED_HEADS = (
    *("helium", "stablelm", "opt", "biogpt"),
    *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
)


@dataclass(frozen=True)
class Attention:
    """The attention of a model.

    Attributes:
        name, projections: names of its block, and of the query, key, value and output projections in it, if it has
            these.
        stated: what its tensors say about the keys of config.json for the number of key-value heads and their size.
        whole: why KV groups can't be pruned; empty if they can.
        unlike: why its matrices can't be given a low rank; empty if they can.
    """

    name: str
    projections: tuple[str, ...]
    stated: dict[str, int]
    whole: str
    unlike: str


def attention_of(config: Mapping[str, Any], parts: Sequence[Shapes]) -> Attention:
    """The attention of layers with these tensors: that of the first layer that has one of a known kind."""
    for there in parts:
        for name in dict.fromkeys(it.partition(".")[0] for it in there if re.fullmatch(r"\w+\.q_proj\.weight", it)):
            for output in _OUTPUTS:
                projections = ("q_proj", "k_proj", "v_proj", output)
                weights = [f"{name}.{it}.weight" for it in projections]
                if all(len(there.get(it, ())) == 2 for it in weights) and "linear" not in name:
                    return _known(config, parts, name, projections, there)
    inside = [it for there in parts for it in there if _ATTENTION.match(it)]
    why = "it has no attention of a kind that is known"
    if latent := next((it for it in inside if ".kv_a_proj" in it), None):
        why = f"its attention keeps one latent vector for all heads ({latent})"
    if fused := next((it for it in inside if ".qkv_proj" in it or ".query_key_value" in it), None):
        why = f"its queries, keys and values are one matrix ({fused})"
    return Attention(inside[0].partition(".")[0] if inside else "self_attn", (), {}, why, why)


def _known(
    config: Mapping[str, Any], parts: Sequence[Shapes], name: str, projections: tuple[str, ...], there: Shapes
) -> Attention:
    weights = [f"{name}.{it}.weight" for it in projections]
    sizes = config.get(LAYER_SIZES) or {}
    queries = int(sizes.get("num_attention_heads", [config["num_attention_heads"]])[0])
    head_dim = there[weights[0]][0] // queries
    stated = {"num_key_value_heads": there[weights[1]][0] // head_dim, "head_dim": head_dim} if head_dim else {}
    without = [layer for layer, others in enumerate(parts) if not all(it in others for it in weights)]
    unlike = whole = ""
    if without:
        unlike = f"not all layers have attention (layer {without[0]} has none)"
    elif "num_attention_heads" not in sizes and len({(it[weights[0]][0], it[weights[1]][0]) for it in parts}) > 1:
        unlike = "its layers differ in heads"
    elif config.get("head_dim") not in (None, head_dim):
        whole = "its heads have another size than config.json says"
    elif config["model_type"] in _FIXED_HEADS or config.get("qk_layernorm"):
        whole = "its classes take the size of a head from the number of heads"
    else:
        known = {f"{name}.{it}.{part}" for it in projections for part in ("weight", "bias")}
        inside = sorted((it, shape) for others in parts for it, shape in others.items() if it.startswith(f"{name}."))
        more = [it for it, shape in inside if it not in known and (list(shape) != [head_dim] or "norm" not in it)]
        whole = f"{more[0]} has something of all heads" if more else ""
    return Attention(name, projections, stated, unlike or whole, unlike)


def adapted_linears(attention: str, parts: Sequence[Shapes], *, experts: bool) -> tuple[str, ...]:
    """Names within a layer of the linear layers that get an adapter in attention of whatever kind.

    Args:
        experts: whether the model is a mixture of experts.
    """
    linears = {
        name.removesuffix(".weight")
        for there in parts
        for name, shape in there.items()
        if name.endswith(".weight") and len(shape) == 2 and "norm" not in name and _CHOOSING not in name
        if name.startswith((f"{attention}.", f"{_LINEAR_ATTENTION}."))
    }
    return tuple(sorted(it for it in linears if not (experts and _OF_EXPERTS.fullmatch(it.rpartition(".")[2]))))


@dataclass(frozen=True)
class Norms:
    """The norms of a model's layers, under the names of ``Family``'s attributes."""

    attention_norm: str | None = None
    attention_norm_after: str | None = None
    mlp_norm: str | None = None
    mlp_norm_after: str | None = None
    no_sequence: str = ""


def norms_of(config: Mapping[str, Any], parts: Sequence[Shapes], mlp: str) -> Norms:
    """The norms of layers with these tensors, or why their blocks can't be refitted one after another."""
    found = {
        frozenset(
            name.removesuffix(".weight")
            for name, shape in there.items()
            if name.count(".") == 1 and name.endswith(".weight") and list(shape) == [config["hidden_size"]]
        )
        for there in parts
    }
    norms = found.pop() if len(found) == 1 else frozenset()
    between = sorted(name for there in parts for name in there if "." not in name)
    beside = any(re.match(r"mamba\.", it) and any(map(_ATTENTION.match, there)) for there in parts for it in there)
    gpt_neox_parallel = config["model_type"] == "gpt_neox" and config.get("use_parallel_residual", True)
    if between:
        return Norms(no_sequence=f"a layer does more ({between[0]})")
    if beside:
        return Norms(no_sequence="its attention and its state-space block read the same hidden states")
    if norms == {"input_layernorm"} or gpt_neox_parallel:
        return Norms(no_sequence="its attention and its MLP read the same hidden states")
    if not mlp:
        return Norms(no_sequence="its MLP is no module of its own")
    for of_attention, of_mlp in _NORMS:
        if norms == {norm for norm in (*of_attention, *of_mlp) if norm}:
            return Norms(*of_attention, *of_mlp)
    told = ", ".join(sorted(norms)) or "they differ, or have no weights"
    return Norms(no_sequence=f"what its norms do isn't known ({told})")

"""The attention and the norms of an unlisted architecture, found by the names and shapes of its layers' tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_dist.structures.units import LAYER_SIZES

Shapes = Mapping[str, Sequence[int]]

_ATTENTIONS = tuple(("q_proj", "k_proj", "v_proj", output) for output in ("o_proj", "out_proj", "dense"))
_BLOCKS = r"(self_attn|attention)\."
# What layers have in place of it where attention is linear; short convolutions and state-space blocks are no attention.
_LINEAR_ATTENTION = "linear_attn"
# Parts of attention that choose keys: no gradient reaches their weights.
_CHOOSING = ".indexer."
# In a mixture of experts, peft takes these names for those of experts' matrices.
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")
# The norms of a layer -> for attention and for the MLP, the norm before the block and the norm after it.
_NORMS: dict[frozenset[str], tuple[tuple[str | None, str | None], tuple[str | None, str | None]]] = {
    frozenset(norm for block in blocks for norm in block if norm): blocks
    for blocks in (
        (("input_layernorm", None), ("post_attention_layernorm", None)),
        (("input_layernorm", None), ("pre_feedforward_layernorm", None)),
        (("input_layernorm", None), ("pre_ff_layernorm", None)),
        (("operator_norm", None), ("ffn_norm", None)),
        (("operator_norm", "post_operator_norm"), ("ffn_norm", "post_ffn_norm")),
        (("attention_layernorm", None), ("feedforward_layernorm", None)),
        ((None, "post_attention_layernorm"), (None, "post_feedforward_layernorm")),
        (
            ("input_layernorm", "post_attention_layernorm"),
            ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        ),
        (("input_layernorm", "post_attention_layernorm"), ("pre_mlp_layernorm", "post_mlp_layernorm")),
        (("input_layernorm", "post_norm1"), ("post_attention_layernorm", "post_norm2")),
        (("input_layernorm", "post_self_attn_layernorm"), ("post_attention_layernorm", "post_mlp_layernorm")),
    )
}
# Architectures in which config.json can't set the size of a head; neither names nor shapes tell which these are.
_FIXED_HEADS = (
    *("helium", "stablelm", "opt", "biogpt"),
    *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
)
_PARALLEL = frozenset({"input_layernorm"})
# Architectures whose attention and MLP read the same hidden states unless config.json says otherwise -> its key.
_PARALLEL_KEYS = {"gpt_neox": "use_parallel_residual"}


@dataclass(frozen=True)
class Attention:
    """The attention of a model.

    Attributes:
        name, projections: names of its block and of the linear layers in it, if it has any.
        heads: see ``Family``.
        whole: why KV groups can't be pruned; empty if they can.
        unlike: why its matrices can't be given a low rank; empty if they can.
    """

    name: str
    projections: tuple[str, ...]
    heads: dict[str, int]
    whole: str
    unlike: str

    @classmethod
    def of(cls, config: Mapping[str, Any], parts: Sequence[Shapes]) -> Attention:
        """Find the attention in the first layer that has one."""
        for there in parts:
            for query, *others, output in _ATTENTIONS:
                for name in (it.partition(".")[0] for it in there if re.fullmatch(rf"\w+\.{query}\.weight", it)):
                    projections = (query, *others, output)
                    if (
                        all(len(there.get(f"{name}.{it}.weight", ())) == 2 for it in projections)
                        and "linear" not in name
                    ):
                        return cls._with(config, parts, there, (name, projections))
        return cls._unknown(parts)

    @classmethod
    def _unknown(cls, parts: Sequence[Shapes]) -> Attention:
        """Attention of another kind, whose linear layers can be trained, but not pruned in part."""
        inside = {it: shape for there in parts for it, shape in there.items() if re.match(_BLOCKS, it)}
        name = next((it.partition(".")[0] for it in inside), "self_attn")
        own = {it: shape for it, shape in inside.items() if _CHOOSING not in it}
        linears = {it.split(".")[-2] for it, shape in own.items() if it.endswith(".weight") and len(shape) == 2}
        latent = next((it for it in inside if ".kv_a_proj" in it), None)
        fused = next((it for it in inside if ".qkv_proj" in it or ".query_key_value" in it), None)
        why = "it has no attention of a kind that is known"
        if latent:
            why = f"its attention keeps one latent vector for all heads ({latent})"
        if fused:
            why = f"its queries, keys and values are one matrix ({fused})"
        return cls(name, tuple(sorted(linears)), {}, why, why)

    @classmethod
    def _with(
        cls, config: Mapping[str, Any], parts: Sequence[Shapes], there: Shapes, found: tuple[str, tuple[str, ...]]
    ) -> Attention:
        name, projections = found
        query, key = (there[f"{name}.{it}.weight"][0] for it in projections[:2])
        queries = int((config.get(LAYER_SIZES) or {}).get("num_attention_heads", [config["num_attention_heads"]])[0])
        head_dim = query // queries
        heads = {"num_key_value_heads": key // head_dim, "head_dim": head_dim} if head_dim else {}
        unlike = _why_unlike(config, parts, [f"{name}.{it}.weight" for it in projections])
        return cls(name, projections, heads, unlike or _why_whole(config, parts, found, head_dim), unlike)


def _why_unlike(config: Mapping[str, Any], parts: Sequence[Shapes], weights: Sequence[str]) -> str:
    """How the attention of some layers differs from that of others, other than by pruned heads; empty if it doesn't."""
    without = [layer for layer, there in enumerate(parts) if not all(it in there for it in weights)]
    if without:
        return f"not all layers have attention (layer {without[0]} has none)"
    pruned_heads = "num_attention_heads" in (config.get(LAYER_SIZES) or {})
    if not pruned_heads and len({tuple(tuple(there[it][:1]) for it in weights[:2]) for there in parts}) > 1:
        return "its layers differ in heads"
    return ""


def _why_whole(
    config: Mapping[str, Any], parts: Sequence[Shapes], found: tuple[str, tuple[str, ...]], head_dim: int
) -> str:
    """Why no KV group can be removed from an attention that all layers have; empty if some can."""
    name, projections = found
    if config.get("head_dim") not in (None, head_dim):
        return "its heads have another size than config.json says"
    if config["model_type"] in _FIXED_HEADS or config.get("qk_layernorm"):
        return "its classes take the size of a head from the number of heads"
    known = {f"{name}.{it}.{part}" for it in projections for part in ("weight", "bias")}
    for there in parts:
        for more in sorted(it for it in there if it.startswith(f"{name}.") and it not in known):
            if list(there[more]) != [head_dim] or "norm" not in more:
                return f"{more} has something of all heads"
    return ""


def adapted_linears(attention: Attention, parts: Sequence[Shapes], *, experts: bool) -> tuple[str, ...]:
    """See ``Family.adapted_attention``: names within a layer of the linear layers that get an adapter in attention of
    whatever kind. Empty if matching layers by the last part of their names (``q_proj``, ...) selects exactly these.

    Args:
        experts: whether the model is a mixture of experts.
    """
    matrices = {
        name.removesuffix(".weight")
        for there in parts
        for name, shape in there.items()
        if name.endswith(".weight") and len(shape) == 2 and "norm" not in name
    }
    blocks = (f"{attention.name}.", f"{_LINEAR_ATTENTION}.")
    linears = {name for name in matrices if name.startswith(blocks) and _CHOOSING not in name}
    linears -= {name for name in linears if experts and name.rpartition(".")[2] in _OF_EXPERTS}
    by_projections = {name for name in matrices if name.rpartition(".")[2] in attention.projections}
    return () if linears == by_projections else tuple(sorted(linears))


def _attends(there: Shapes) -> bool:
    """Whether a layer with these tensors has attention."""
    return any(re.match(_BLOCKS, name) for name in there)


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
    hidden_size = config["hidden_size"]
    found = {
        frozenset(
            name.removesuffix(".weight")
            for name, shape in there.items()
            if name.count(".") == 1 and name.endswith(".weight") and list(shape) == [hidden_size]
        )
        for there in parts
    }
    norms = found.pop() if len(found) == 1 else frozenset()
    between = sorted(name for there in parts for name in there if "." not in name)
    if between:
        return Norms(no_sequence=f"a layer does more ({between[0]})")
    parallel = _PARALLEL_KEYS.get(str(config["model_type"]))
    beside = next((name for there in parts for name in there if name.startswith("mamba.") and _attends(there)), None)
    is_parallel = norms == _PARALLEL or (parallel is not None and config.get(parallel, True))
    if norms in _NORMS and mlp and not is_parallel and not beside:
        of_attention, of_mlp = _NORMS[norms]
        return Norms(*of_attention, *of_mlp)
    if is_parallel:
        why = "its attention and its MLP read the same hidden states"
    elif beside:
        why = f"its attention and its state-space block read the same hidden states ({beside})"
    elif not mlp:
        why = "its MLP is no module of its own"
    else:
        why = f"what its norms do isn't known ({', '.join(sorted(norms)) or 'they differ, or have no weights'})"
    return Norms(no_sequence=why)

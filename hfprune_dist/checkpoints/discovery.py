"""Where the parts of an architecture are that isn't listed, by the names and shapes of a checkpoint's tensors.

A name tells what a tensor is, and its shape confirms it. What names can't tell, how the parts work together, is checked
when the model runs: each layer against the whole model (``distributed.whole_model_probe``), the head against its logits
(``models.after_head``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_dist.checkpoints.expert_discovery import find_experts
from hfprune_dist.checkpoints.families import Family, not_supported
from hfprune_dist.structures.experts import number_of_experts
from hfprune_dist.structures.units import LAYER_SIZES

Shapes = Mapping[str, Sequence[int]]

# Of rotary embeddings: saved with some checkpoints, computed by every model.
BUFFERS = "rotary_emb.inv_freq"
# Row projections and down projection of a gated MLP: gate and up, or both in one.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
)
_ATTENTIONS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "k_proj", "v_proj", "out_proj"))
# The norms of a layer -> of attention and of the MLP, that which the block reads and that which its outputs go through.
_NORMS: dict[frozenset[str], tuple[tuple[str | None, str | None], tuple[str | None, str | None]]] = {
    frozenset(norm for block in blocks for norm in block if norm): blocks
    for blocks in (
        (("input_layernorm", None), ("post_attention_layernorm", None)),
        (("input_layernorm", None), ("pre_feedforward_layernorm", None)),
        (("input_layernorm", None), ("pre_ff_layernorm", None)),
        (("operator_norm", None), ("ffn_norm", None)),
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
# What neither names nor shapes tell: config.json has no say in the size of a head.
_FIXED_HEADS = ("helium", "stablelm")
# Whose models transformers makes of another architecture's class.
_CLASSES = {"internlm3": "Llama", "iquestcoder": "Llama"}
_PARALLEL = frozenset({"input_layernorm"})
# Projections of shared experts where no layer has a plain MLP.
_BESIDE_EXPERTS = ("mlp", ("gate_proj", "up_proj"), "down_proj")
# Layers behind the last one, which predict further tokens; they are no part of the model, and pruning leaves them out.
_PREDICTING = "num_nextn_predict_layers"


def discover(config: Mapping[str, Any], shapes: Shapes, where: str) -> tuple[Family, dict[str, Any]]:
    """Find the parts of a model.

    Args:
        shapes: of all tensors in the checkpoint's files.

    Returns:
        Its family; and keys of config.json that it lacks, or that mean something else there, with what holds for it.

    Raises:
        UserError: naming what is missing, or what is there besides.
    """
    search = _Search(config, shapes, where)
    layers = search.prefix()
    parts = search.parts_of_layers(layers)
    experts = find_experts(config, parts, search.refusal) if number_of_experts(config) else None
    plain = {layer: there for layer, there in enumerate(parts) if experts is None or layer not in experts.layers}
    mlp, rows, down = search.mlp(plain) if plain else _BESIDE_EXPERTS
    mlp = experts.module.rpartition(".")[0] if experts else mlp
    attention = _Attention.of(config, parts)
    body = layers.rpartition(".")[0]
    outside = {name for name in shapes if name.startswith(f"{body}.") and not name.startswith(f"{layers}.")}
    norm, embedding = search.norm(outside), search.embedding(outside)
    search.check_outside(outside, {norm, embedding})
    of_layers = {f"{layers}.{layer}.{name}" for layer, part in enumerate(parts) for name in part}
    head = {name for name in shapes if name.startswith("lm_head.")}
    family = Family(
        model_type=str(config["model_type"]),
        architecture=search.architecture(),
        body=body,
        embedding=embedding,
        layers=layers,
        norm=norm,
        mlp=mlp,
        row_projections=rows,
        down_projection=down,
        heads=attention.heads,
        any_heads=config["hidden_size"] % int(config["num_attention_heads"]) != 0,
        found=frozenset(name for name in of_layers | outside | head if not name.endswith(BUFFERS)),
        experts=experts,
        dense_layers=bool(plain),
        **attention.names(),
        **(_norms_of(parts, config["hidden_size"]) | ({"no_sequence": "it has experts"} if experts else {})),
    )
    return family, _stated(config, family, parts[0], head)


def _stated(config: Mapping[str, Any], family: Family, parts: Shapes, head: set[str]) -> dict[str, Any]:
    """See ``discover``."""
    silent: dict[str, Any] = {"tie_word_embeddings": not head}
    queries = int(config["num_attention_heads"])
    if family.heads.get("num_key_value_heads", queries) != queries:
        silent["num_key_value_heads"] = family.heads["num_key_value_heads"]
    if family.heads.get("head_dim", config["hidden_size"] // queries) != config["hidden_size"] // queries:
        silent["head_dim"] = family.heads["head_dim"]
    told = {key: value for key, value in silent.items() if config.get(key) is None}
    told |= {_PREDICTING: 0} if config.get(_PREDICTING) else {}
    if config.get("block_auto_adjust_ff_dim", False) or (
        config["model_type"] == "lfm2" and "block_auto_adjust_ff_dim" not in config
    ):
        width = parts[f"{family.mlp}.{family.down_projection}.weight"][1]
        told |= {"block_auto_adjust_ff_dim": False, "intermediate_size": width}
        told |= {"block_ff_dim": width} if "block_ff_dim" in config else {}
    return told


class _Search:
    """A checkpoint's tensors, with what to tell where something is missing."""

    def __init__(self, config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
        self._config = config
        self._shapes = shapes
        self._where = where
        self._hidden_size = config["hidden_size"]

    def refusal(self, why: str) -> Exception:
        """What to raise for such a reason."""
        return not_supported(self._config, self._where, why)

    def architecture(self) -> str:
        """The stem of its classes' names."""
        if self._config["model_type"] in _CLASSES:
            return _CLASSES[self._config["model_type"]]
        names = self._config.get("architectures") or [""]
        found = re.fullmatch(r"(?:Pruned)?(\w+)ForCausalLM", str(names[0]))
        if found is None:
            raise self.refusal(f"architectures is {names[0]!r}, which is no ...ForCausalLM")
        return found[1]

    def prefix(self) -> str:
        """What the names of a layer's tensors begin with, before its number."""
        wanted = range(self._config["num_hidden_layers"])
        numbers: dict[str, set[int]] = {}
        for name in self._shapes:
            if found := re.match(r"((?:\w+\.)*layers)\.(\d+)\.", name):
                numbers.setdefault(found[1], set()).add(int(found[2]))
        stacks = [prefix for prefix, there in numbers.items() if there.issuperset(wanted)]
        if len(stacks) != 1:
            found_here = ", ".join(sorted(numbers)) or "none"
            raise self.refusal(f"it has no one stack of {len(wanted)} layers (tensors of: {found_here})")
        return stacks[0]

    def parts_of_layers(self, layers: str) -> Sequence[Shapes]:
        """The tensors of each layer, by their names within it."""
        parts: list[dict[str, Sequence[int]]] = [{} for _ in range(self._config["num_hidden_layers"])]
        for name, shape in self._shapes.items():
            if name.startswith(f"{layers}."):
                number, _, part = name.removeprefix(f"{layers}.").partition(".")
                if number.isdigit() and int(number) < len(parts):
                    parts[int(number)][part] = shape
        return parts

    def mlp(self, parts: Mapping[int, Shapes]) -> tuple[str, tuple[str, ...], str]:
        """The gated MLP that each of these layers has: its name, its row projections and its down projection."""
        first = next(iter(parts.values()))
        for rows, down in _MLPS:
            names = sorted(name for name in first if re.fullmatch(rf"\w+\.{down}\.weight", name))
            for block in (name.partition(".")[0] for name in names):
                weights = [f"{block}.{name}.weight" for name in (*rows, down)]
                if all(weight in first for weight in weights):
                    self._check_mlp(block, {*rows, down}, weights, parts)
                    return block, rows, down
        inside = ", ".join(sorted({name.rpartition(".")[0] for name in first if len(first[name]) > 1}))
        raise self.refusal(f"its layers have no gated MLP of a kind that is known (they have {inside})")

    def _check_mlp(self, block: str, known: set[str], weights: Sequence[str], parts: Mapping[int, Shapes]) -> None:
        first = min(parts)
        for layer, there in parts.items():
            if missing := [name for name in weights if name not in there]:
                raise self.refusal(f"layer {layer} has no {missing[0]}, which layer {first} has")
            expected = {f"{block}.{name}.{part}" for name in known for part in ("weight", "bias")}
            if more := sorted(name for name in there if name.startswith(f"{block}.") and name not in expected):
                raise self.refusal(f"in layer {layer}, {more[0]} is no part of a plain gated MLP")
        *rows, down = (parts[first][name] for name in weights)
        width = down[1] * (1 if len(rows) > 1 else 2)
        if any(list(row) != [width, self._hidden_size] for row in rows):
            raise self.refusal(
                f"{weights[0]} of layer {first} has shape {list(rows[0])}, not {[width, self._hidden_size]}"
            )

    def norm(self, outside: set[str]) -> str:
        """The final norm."""
        found = [name for name in outside if list(self._shapes[name]) == [self._hidden_size]]
        names = {name.rpartition(".")[0] for name in found if name.endswith(".weight")}
        if len(names) != 1:
            raise self.refusal(f"behind its layers it has no one norm with a weight (but {sorted(found)})")
        return names.pop()

    def embedding(self, outside: set[str]) -> str:
        """The table of token embeddings."""
        wanted = [self._config.get("vocab_size"), self._hidden_size]
        found = [name for name in outside if name.endswith(".weight") and list(self._shapes[name]) == wanted]
        if len(found) != 1:
            raise self.refusal(f"it has no one table of embeddings of shape {wanted}")
        return found[0].removesuffix(".weight")

    def check_outside(self, outside: set[str], known: set[str]) -> None:
        """Refuse what works between layers, which passes through one layer at a time know nothing of."""
        more = [name for name in outside if name.rpartition(".")[0] not in known and not name.endswith(BUFFERS)]
        if more:
            raise self.refusal(f"beside its layers it has {sorted(more)[0]}")
        shared = self._config.get("num_kv_shared_layers")
        if shared:
            raise self.refusal(f"its last {shared} layers read keys and values of others (num_kv_shared_layers)")


@dataclass(frozen=True)
class _Attention:
    """The attention of a model.

    Attributes:
        name, projections: of its block and of the linear layers in it, where there are such.
        heads: see ``Family``.
        whole: why KV groups can't be pruned.
    """

    name: str
    projections: tuple[str, ...]
    heads: dict[str, int]
    whole: str

    def names(self) -> dict[str, Any]:
        """As ``Family`` has them."""
        return {"attention": self.name, "attention_projections": self.projections, "whole_groups": self.whole}

    @classmethod
    def of(cls, config: Mapping[str, Any], parts: Sequence[Shapes]) -> _Attention:
        """Find it in the first layer that has one."""
        for there in parts:
            for query, *others, output in _ATTENTIONS:
                for name in (it.partition(".")[0] for it in there if re.fullmatch(rf"\w+\.{query}\.weight", it)):
                    projections = (query, *others, output)
                    if all(f"{name}.{it}.weight" in there for it in projections) and "linear" not in name:
                        return cls._with(config, parts, there, (name, projections))
        return cls._unknown(parts)

    @classmethod
    def _unknown(cls, parts: Sequence[Shapes]) -> _Attention:
        """One of another kind, whose linear layers can learn but go as a whole."""
        inside = {it: shape for there in parts for it, shape in there.items() if it.startswith("self_attn.")}
        linears = {it.split(".")[-2] for it, shape in inside.items() if it.endswith(".weight") and len(shape) == 2}
        latent, fused = (next((it for it in inside if part in it), None) for part in (".kv_a_proj", ".qkv_proj"))
        why = "it has no attention of a kind that is known"
        if latent:
            why = f"its attention keeps one latent vector for all heads ({latent})"
        if fused:
            why = f"its queries, keys and values are one matrix ({fused})"
        return cls("self_attn", tuple(sorted(linears)), {}, why)

    @classmethod
    def _with(
        cls, config: Mapping[str, Any], parts: Sequence[Shapes], there: Shapes, found: tuple[str, tuple[str, ...]]
    ) -> _Attention:
        name, projections = found
        query, key = (there[f"{name}.{it}.weight"][0] for it in projections[:2])
        queries = int((config.get(LAYER_SIZES) or {}).get("num_attention_heads", [config["num_attention_heads"]])[0])
        head_dim = query // queries
        heads = {"num_key_value_heads": key // head_dim, "head_dim": head_dim} if head_dim else {}
        return cls(name, projections, heads, _why_whole(config, parts, found, head_dim))


def _why_whole(
    config: Mapping[str, Any], parts: Sequence[Shapes], found: tuple[str, tuple[str, ...]], head_dim: int
) -> str:
    """Why no KV group can go from a model's attention; empty where some can."""
    name, projections = found
    weights = [f"{name}.{it}.weight" for it in projections]
    without = [layer for layer, there in enumerate(parts) if not all(it in there for it in weights)]
    if without:
        return f"layer {without[0]} has none"
    if LAYER_SIZES not in config and len({tuple(there[it][0] for it in weights[:2]) for there in parts}) > 1:
        return "its layers differ in heads"
    if config["model_type"] in _FIXED_HEADS:
        return "its classes take the size of a head from the number of heads"
    known = {f"{name}.{it}.{part}" for it in projections for part in ("weight", "bias")}
    for there in parts:
        for more in sorted(it for it in there if it.startswith(f"{name}.") and it not in known):
            if list(there[more]) != [head_dim] or "norm" not in more:
                return f"{more} has something of all heads"
    return ""


def _norms_of(parts: Sequence[Shapes], hidden_size: int) -> dict[str, Any]:
    """Names of norms as ``Family`` has them, and why its blocks can't be refitted one after another."""
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
        return {"attention_norm": None, "mlp_norm": None, "no_sequence": f"a layer does more ({between[0]})"}
    if norms in _NORMS:
        (attention, attention_after), (of_mlp, mlp_after) = _NORMS[norms]
        return {
            "attention_norm": attention,
            "attention_norm_after": attention_after,
            "mlp_norm": of_mlp,
            "mlp_norm_after": mlp_after,
        }
    if norms == _PARALLEL:
        why = "its attention and its MLP read the same hidden states"
    else:
        why = f"what its norms do isn't known ({', '.join(sorted(norms)) or 'they differ, or have no weights'})"
    return {"attention_norm": None, "mlp_norm": None, "no_sequence": why}

"""Locating the parts of a model by the names and shapes of a checkpoint's tensors: one pass, whose result is a family.

A tensor's name tells what it is, and its shape confirms it. Names can't tell how the parts work together; that is
checked when the model runs: each layer against the whole model (``distributed.layer_check``), and the head
against the model's logits (``models.loading.after_head``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hfprune_dist.checkpoints.expert_discovery import Refuse, Shapes, find_experts
from hfprune_dist.checkpoints.families import CAUSAL, WITH_VISION, Family, not_supported
from hfprune_dist.structures.experts import Projections
from hfprune_dist.structures.low_rank import with_products
from hfprune_dist.structures.units import LAYER_SIZES

# Buffers of rotary embeddings and masks: some checkpoints hold them, but every model computes them itself.
_BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# An MLP's row projections, its down projection, and the number of matrices in each row projection: separate gate and up
# projections, both in one, or no gate.
_MLPS: tuple[Projections, ...] = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("input_linear",), "output_linear", 2),
    (("w1", "w3"), "w2", 1),
    (("up_proj",), "down_proj", 1),
    (("fc1",), "fc2", 1),
    (("c_fc",), "c_proj", 1),
    (("dense_h_to_4h",), "dense_4h_to_h", 1),
)
# Parameters of a learned activation: single numbers, not one per neuron.
_OF_ACTIVATION = re.compile(r"\w+\.act_fn\.\w+")
_OUTPUTS = ("o_proj", "out_proj", "dense")
_ATTENTION = re.compile(r"(self_attn|attention)\.")
# Architectures in which config.json can't set the size of a head; neither names nor shapes tell which these are.
_FIXED_HEADS = (
    *("helium", "stablelm", "opt", "biogpt"),
    *("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
)
# Tensors of attention that doesn't notice when positions restart: convolutions over tokens, decay rates of a state, and
# whatever chooses among keys; and architectures that don't pass positions to their attention.
_BLIND_PARTS = re.compile(r"conv1d\.|\.A_log$|\.slope_rate$|\.indexer\.")
_BLIND = ("afmoe", "gpt_oss", "granitemoehybrid")
# The architecture in which a layer that doesn't choose keys itself attends to those that an earlier layer chose.
_SHARING_CHOICES, _CHOOSES = "glm_moe_dsa", "self_attn.indexer."
# Linear layers of attention that LoRA leaves out: parts that choose keys get no gradient, and in a mixture of experts
# peft takes the names of MLPs' projections for those of experts.
_OF_EXPERTS = re.compile(r"(gate|up|down)_proj")
# The norms of a layer: before and after attention, before and after the MLP.
_NORMED = ("attention_norm", "attention_norm_after", "mlp_norm", "mlp_norm_after")
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", None, "pre_feedforward_layernorm", None),
    ("input_layernorm", None, "pre_ff_layernorm", None),
    ("operator_norm", None, "ffn_norm", None),
    ("operator_norm", "post_operator_norm", "ffn_norm", "post_ffn_norm"),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
# Next to a model's layers: tables of positions, which are added to the embeddings.
_POSITIONS = ".embed_positions."
# The final norm of architectures whose norms have no weights.
_BARE_NORMS = {"olmo": "norm", "nanochat": "norm"}
# The head's name, if it isn't ``lm_head``, for checkpoints that lack its tensor.
_HEADS = {"biogpt": "output_projection"}
# Architectures whose models transformers builds with another architecture's class.
_CLASSES = dict.fromkeys(("internlm3", "iquestcoder", "exaone"), "Llama") | {"sarvam_mla": "DeepseekV3"}
# Extra layers after the last one, which predict further tokens; they aren't part of the model, and pruning leaves them
# out. They are either numbered like the others or named differently.
_PREDICTING, _PREDICTING_NAMES = ("num_nextn_predict_layers", "mtp_num_hidden_layers"), ("mtp.", "mtp_")


def discover(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], where: str, *, has_vision: bool = False
) -> tuple[Family, dict[str, Any]]:
    """Return a model's family, by the shapes of all tensors in its files (of its text decoder's, if it sees images),
    and values for keys that config.json lacks or that mean something else there. What isn't supported is refused.
    """
    refuse, model_type = partial(not_supported, config, where), str(config["model_type"])
    shapes = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(_BUFFERS)}
    task = WITH_VISION if has_vision else CAUSAL
    name = str((config.get("architectures") or [""])[0])
    stem = re.fullmatch(rf"(?:Pruned)?(\w+){task}", name)
    if model_type not in _CLASSES and stem is None:
        raise refuse(f"architectures is {name!r}, which doesn't end in {task}")
    layers = _stack(config, shapes, refuse)
    body = layers.rpartition(".")[0]
    tensors = by_layer(config, shapes, layers)
    apart = (f"{layers}.", *(f"{body}.{name}" for name in _PREDICTING_NAMES))
    outside = {name: shapes[name] for name in shapes if name.startswith(f"{body}.") and not name.startswith(apart)}
    embedding, norm = _outside_layers(config, outside, body, refuse)
    _require_alike(config, tensors, refuse)
    parts: list[Shapes] = [with_products(config, there) for there in tensors]
    experts = find_experts(config, parts, refuse)
    plain = {layer: there for layer, there in enumerate(parts) if experts is None or layer not in experts.layers}
    mlp, projections = _mlp(plain, refuse) if plain else ("mlp", _MLPS[0])
    mlp = experts.module.rpartition(".")[0] if experts else mlp
    attention, stated = _attention(config, parts)
    head = _head(config, shapes, body)
    of_head = {name for name in shapes if name.startswith(f"{head}.")}
    of_layers = {f"{layers}.{layer}.{name}" for layer, there in enumerate(tensors) for name in there}
    everywhere = all(any(name.startswith(f"{attention['attention']}.") for name in there) for there in parts)
    blind = model_type in _BLIND or any(_BLIND_PARTS.search(name) for there in parts for name in there)
    counted = any(_POSITIONS in name for name in outside)  # the model counts the positions itself
    family = Family(
        model_type=model_type,
        architecture=_CLASSES.get(model_type) or (stem[1] if stem else ""),
        tensors=frozenset({*of_layers, *outside, *of_head, f"{head}.weight"}),
        task=task,
        body=body,
        head=head,
        embedding=embedding,
        layers=layers,
        norm=norm,
        mlp=mlp,
        projections=projections,
        keeps_apart=everywhere and not blind and not counted,
        experts=experts,
        adapted_attention=_adapted_linears(attention["attention"], parts, of_mixture=experts is not None),
        **attention,
        **_norms(config, parts, mlp) | ({"no_sequence": "it has experts"} if experts else {}),
    )
    stated["tie_word_embeddings"] = not of_head
    told = {key: value for key, value in stated.items() if config.get(key) is None}
    return family, told | _overridden(config, family, parts[0])


def _overridden(config: Mapping[str, Any], family: Family, first: Shapes) -> dict[str, Any]:
    """The values of keys that mean something else in config.json than here."""
    told: dict[str, Any] = {key: 0 for key in _PREDICTING if config.get(key)}
    if config.get("block_auto_adjust_ff_dim", config["model_type"] == "lfm2"):
        width = first[f"{family.mlp}.{family.projections[1]}.weight"][1]
        told |= {"block_auto_adjust_ff_dim": False, "intermediate_size": width}
        told |= {"block_ff_dim": width} if "block_ff_dim" in config else {}
    return told


def _stack(config: Mapping[str, Any], shapes: Shapes, refuse: Refuse) -> str:
    """The beginning of the names of a layer's tensors, before the layer's number."""
    count = config["num_hidden_layers"]
    numbers: dict[str, set[int]] = {}
    for name in shapes:
        if found := re.match(r"((?:(?!mtp)\w+\.)*layers)\.(\d+)\.", name):
            numbers.setdefault(found[1], set()).add(int(found[2]))
    missing = {prefix: sorted({*range(count)} - there) for prefix, there in numbers.items()}
    stacks = [prefix for prefix, layers in missing.items() if not layers]
    if len(stacks) != 1:
        there = [
            prefix + (f" ({prefix}.{gone[0]} is missing)" if gone else "") for prefix, gone in sorted(missing.items())
        ]
        has = ", ".join(there) or min(shapes)
        raise refuse(f"it doesn't have exactly one stack of num_hidden_layers {count} layers.<number>: it has {has}")
    return stacks[0]


def by_layer(config: Mapping[str, Any], shapes: Shapes, layers: str) -> list[dict[str, Sequence[int]]]:
    """The tensors of each layer, by their names within it; ``layers`` is the beginning of all layers' names."""
    parts: list[dict[str, Sequence[int]]] = [{} for _ in range(config["num_hidden_layers"])]
    for name, shape in shapes.items():
        number, _, part = name.removeprefix(f"{layers}.").partition(".")
        if name.startswith(f"{layers}.") and number.isdigit() and int(number) < len(parts):
            parts[int(number)][part] = shape
    return parts


def _outside_layers(config: Mapping[str, Any], outside: Shapes, body: str, refuse: Refuse) -> tuple[str, str]:
    """Names of the embedding's table and of the final norm; other parts that act between layers are refused."""
    hidden, shared = config["hidden_size"], config.get("num_kv_shared_layers")
    if (embedded := config.get("word_embed_proj_dim")) not in (None, hidden):
        raise refuse(f"its embeddings are of another size than its layers (word_embed_proj_dim {embedded})")
    if shared:
        raise refuse(f"its last {shared} layers read keys and values of others (num_kv_shared_layers)")
    known = {name: shape for name, shape in outside.items() if _POSITIONS not in name}
    tables = [name for name, shape in known.items() if shape == (config["vocab_size"], hidden)]
    if len(tables) != 1:
        there = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(known.items()) if len(shape) == 2) or "none"
        wanted = f"vocab_size and hidden_size {[config['vocab_size'], hidden]}"
        raise refuse(f"it doesn't have exactly one table of embeddings of {wanted} (tables: {there})")
    norms = [name for name, shape in known.items() if name.endswith(".weight") and shape == (hidden,)]
    if bare := _BARE_NORMS.get(str(config["model_type"])):
        norms = [f"{body}.{bare}.weight"]
    if len(norms) != 1:
        raise refuse(f"it doesn't have exactly one norm of {[hidden]} after its layers (found: {sorted(norms)})")
    embedding, norm = (name.removesuffix(".weight") for name in (*tables, *norms))
    if more := [name for name in known if name.rpartition(".")[0] not in (embedding, norm)]:
        raise refuse(f"beside its layers it has {min(more)}")
    return embedding, norm


def _head(config: Mapping[str, Any], shapes: Shapes, body: str) -> str:
    """Name of the projection to the vocabulary."""
    wanted = (config["vocab_size"], config["hidden_size"])
    found = {name for name, shape in shapes.items() if name.endswith(".weight") and shape == wanted}
    names = {name.removesuffix(".weight") for name in found if not name.startswith(f"{body}.")}
    return names.pop() if len(names) == 1 else _HEADS.get(str(config["model_type"]), "lm_head")


def _require_alike(config: Mapping[str, Any], parts: Sequence[Shapes], refuse: Refuse) -> None:
    """Refuse a layer that lacks a tensor that others of its kind have: transformers would make it up, or, if it would
    choose keys, the layer attends to keys that an earlier one chose.
    """
    kinds = config.get("layer_types") or [""] * len(parts)
    for layer, there in enumerate(parts):
        for other, theirs in enumerate(parts):
            missing = sorted(theirs.keys() - there.keys())
            if config["model_type"] != _SHARING_CHOICES:
                missing = [name for name in missing if not name.startswith(_CHOOSES)]
            if missing and there.keys() < theirs.keys() and kinds[layer] == kinds[other]:
                raise refuse(f"tensor {missing[0]} of layer {layer}, which layer {other} has, is missing")


def _mlp(parts: Mapping[int, Shapes], refuse: Refuse) -> tuple[str, Projections]:
    """The name of the MLP that all of these layers have, and its projections; after checking that it has no more."""
    first = next(iter(parts.values()))
    kinds = ((name.removesuffix(f"{kind[1]}.weight"), kind) for kind in _MLPS for name in sorted(first))
    for block, projections in kinds:
        rows, down, _ = projections
        weights = {f"{block}{name}.weight" for name in (*rows, down)}
        if not weights <= first.keys() or not re.fullmatch(r"(\w+\.)?", block):
            continue
        expected = weights | {f"{block}{name}.bias" for name in (*rows, down)}
        for layer, there in parts.items():
            if missing := sorted(weights - there.keys()):
                raise refuse(f"layer {layer} has no {missing[0]}")
            inside = {name for name in there if block and name.startswith(block)}
            learned = {name for name in inside if _OF_ACTIVATION.fullmatch(name) and there[name] in ((), (1,))}
            if more := sorted(inside - expected - learned):
                raise refuse(f"in layer {layer}, {more[0]} is not part of a plain MLP")
        return block.removesuffix("."), projections
    modules = ", ".join(sorted({name.rpartition(".")[0] for name in first if len(first[name]) > 1}))
    raise refuse(f"its layers have no MLP of a kind that is known (they have {modules})")


def _attention(config: Mapping[str, Any], parts: Sequence[Shapes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``Family``'s attributes of attention, by the first layer of a known kind, and what tensors say of KV heads."""
    for there in parts:
        for name in dict.fromkeys(own.partition(".")[0] for own in there if re.fullmatch(r"\w+\.q_proj\.weight", own)):
            for output in _OUTPUTS:
                projections = ("q_proj", "k_proj", "v_proj", output)
                weights = [f"{name}.{projection}.weight" for projection in projections]
                if "linear" not in name and all(len(there.get(weight, ())) == 2 for weight in weights):
                    return _separate(config, parts, name, projections, there)
    inside = [tensor for there in parts for tensor in there if _ATTENTION.match(tensor)]
    why = "it has no attention of a kind that is known"
    if latent := next((tensor for tensor in inside if ".kv_a_proj" in tensor), None):
        why = f"its attention keeps one latent vector for all heads ({latent})"
    if fused := next((tensor for tensor in inside if ".qkv_proj" in tensor or ".query_key_value" in tensor), None):
        why = f"its queries, keys and values are one matrix ({fused})"
    name = inside[0].partition(".")[0] if inside else "self_attn"
    return {"attention": name, "attention_projections": (), "whole_groups": why, "no_low_rank": why}, {}


def _separate(
    config: Mapping[str, Any], parts: Sequence[Shapes], name: str, projections: tuple[str, ...], there: Shapes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attention with separate projections, whose shapes are those in the layer ``there``."""
    weights, heads = [f"{name}.{part}.weight" for part in projections], int(config["num_attention_heads"])
    sizes = config.get(LAYER_SIZES) or {}
    head_dim = there[weights[0]][0] // int(sizes.get("num_attention_heads", [heads])[0])
    stated = {"num_key_value_heads": there[weights[1]][0] // head_dim, "head_dim": head_dim} if head_dim else {}
    usual = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads}
    without = [layer for layer, others in enumerate(parts) if not all(weight in others for weight in weights)]
    unlike = whole = ""
    if without:
        unlike = f"not all layers have attention (layer {without[0]} has none)"
    elif "num_attention_heads" not in sizes and len({(own[weights[0]][0], own[weights[1]][0]) for own in parts}) > 1:
        unlike = "its layers differ in heads"
    elif config.get("head_dim") not in (None, head_dim):
        whole = "its heads have another size than config.json says"
    elif config["model_type"] in _FIXED_HEADS or config.get("qk_layernorm"):
        whole = "its classes take the size of a head from the number of heads"
    else:
        known = {f"{name}.{projection}.{part}" for projection in projections for part in ("weight", "bias")}
        inside = sorted((own, shape) for others in parts for own, shape in others.items() if own.startswith(f"{name}."))
        more = [own for own, shape in inside if own not in known and (tuple(shape) != (head_dim,) or "norm" not in own)]
        whole = f"{more[0]} has something of all heads" if more else ""
    found = {"attention": name, "attention_projections": projections}
    reasons = {"whole_groups": unlike or whole, "no_low_rank": unlike}
    return found | reasons, {key: value for key, value in stated.items() if value != usual[key]}


def _adapted_linears(attention: str, parts: Sequence[Shapes], *, of_mixture: bool) -> tuple[str, ...]:
    """Names within a layer of attention's linear layers that get an adapter; convolutions and states have none."""
    linears = {
        name.removesuffix(".weight")
        for there in parts
        for name, shape in there.items()
        if name.endswith(".weight") and len(shape) == 2 and "norm" not in name and ".indexer." not in name
        if name.startswith((f"{attention}.", "linear_attn."))
    }
    return tuple(sorted(own for own in linears if not (of_mixture and _OF_EXPERTS.fullmatch(own.rpartition(".")[2]))))


def _norms(config: Mapping[str, Any], parts: Sequence[Shapes], mlp: str) -> dict[str, Any]:
    """The norms of these layers, as attributes of ``Family``, or why their blocks can't be refitted in turn."""
    found = {
        frozenset(
            name.removesuffix(".weight")
            for name, shape in there.items()
            if name.count(".") == 1 and name.endswith(".weight") and tuple(shape) == (config["hidden_size"],)
        )
        for there in parts
    }
    norms = found.pop() if len(found) == 1 else frozenset()
    between = sorted(name for there in parts for name in there if "." not in name)
    told = ", ".join(sorted(norms)) or "they differ, or have no weights"
    why = f"what its norms do isn't known ({told})"
    if between:
        why = f"a layer does more ({between[0]})"
    elif any(re.match(r"mamba\.", tensor) and any(map(_ATTENTION.match, there)) for there in parts for tensor in there):
        why = "its attention and its state-space block read the same hidden states"
    elif norms == {"input_layernorm"} or (
        config["model_type"] == "gpt_neox" and config.get("use_parallel_residual", True)
    ):
        why = "its attention and its MLP read the same hidden states"
    elif not mlp:
        why = "its MLP is no module of its own"
    else:
        for known in _NORMS:
            if norms == {*known} - {None}:
                return dict(zip(_NORMED, known, strict=True))
    return dict.fromkeys(_NORMED) | {"no_sequence": why}

"""Locating the parts of a model by the names and shapes of a checkpoint's tensors.

A tensor's name tells what it is, and its shape confirms it. Names can't tell how the parts work together; that is
checked when the model runs: each layer against the whole model (``distributed.layer_check``), and the head
against the model's logits (``models.after_head``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hfprune_dist.checkpoints.discovered_blocks import Shapes, adapted_linears, attention_of, norms_of
from hfprune_dist.checkpoints.expert_discovery import find_experts
from hfprune_dist.checkpoints.families import CAUSAL, WITH_VISION, Family, not_supported
from hfprune_dist.structures.low_rank import with_products

# Buffers of rotary embeddings and masks: some checkpoints hold them, but every model computes them itself.
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# An MLP's row projections, its down projection, and the number of matrices in each row projection: separate gate and up
# projections, both in one, or no gate.
_MLPS = (
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
# Tensors of attention that doesn't notice when positions restart: convolutions over tokens, decay rates of a state, and
# whatever chooses among keys; and architectures that don't pass positions to their attention.
_BLIND_PARTS = re.compile(r"conv1d\.|\.A_log$|\.slope_rate$|\.indexer\.")
_BLIND = ("afmoe", "gpt_oss", "granitemoehybrid")
# The architecture in which a layer that doesn't choose keys itself attends to those that an earlier layer chose.
_SHARING_CHOICES, _CHOOSES = "glm_moe_dsa", "self_attn.indexer."
# Next to a model's layers: tables of positions, which are added to the embeddings.
_POSITIONS = "embed_positions"
# The final norm of architectures whose norms have no weights.
_BARE_NORMS = {"olmo": "norm", "nanochat": "norm"}
# The head's name, if it isn't ``lm_head``, for checkpoints that lack its tensor.
_HEADS = {"biogpt": "output_projection"}
# Architectures whose models transformers builds with another architecture's class.
_CLASSES = {
    **dict.fromkeys(("internlm3", "iquestcoder", "exaone"), "Llama"),
    "sarvam_mla": "DeepseekV3",
}
# Extra layers after the last one, which predict further tokens; they aren't part of the model, and pruning leaves them
# out. They are either numbered like the others or named differently.
_PREDICTING, _PREDICTING_NAMES = ("num_nextn_predict_layers", "mtp_num_hidden_layers"), ("mtp.", "mtp_")


def discover(
    config: Mapping[str, Any], shapes: Shapes, where: str, *, has_vision: bool = False
) -> tuple[Family, dict[str, Any]]:
    """Find the parts of a model.

    Args:
        shapes: shapes of all tensors in the checkpoint's files; for a model of images and text, of its text decoder's.
        has_vision: whether it is a model of images and text.

    Returns:
        Its family; and the values that hold for keys that its config.json lacks or that mean something else there.

    Raises:
        UserError: naming what is missing or unexpected.
    """
    search = _Search(config, shapes, where)
    task = WITH_VISION if has_vision else CAUSAL
    architecture = search.architecture(task)
    layers = search.stack()
    body = layers.rpartition(".")[0]
    tensors = search.parts_of_layers(layers)
    outside = search.outside_layers(layers)
    embedding, norm = search.embedding(outside), search.norm(body, outside)
    search.require_nothing_else(outside, {norm, embedding})
    search.require_alike(tensors)
    parts = [with_products(config, there) for there in tensors]
    experts = find_experts(config, parts, search.refuse)
    plain = {layer: there for layer, there in enumerate(parts) if experts is None or layer not in experts.layers}
    mlp, rows, down, row_parts = search.mlp(plain) if plain else ("mlp", *_MLPS[0])
    mlp = experts.module.rpartition(".")[0] if experts else mlp
    attention, norms = attention_of(config, parts), norms_of(config, parts, mlp)
    head = search.head(body)
    of_head = {name for name in search.shapes if name.startswith(f"{head}.")}
    of_layers = {f"{layers}.{layer}.{name}" for layer, there in enumerate(tensors) for name in there}
    everywhere = all(any(name.startswith(f"{attention.name}.") for name in there) for there in parts)
    blind = config["model_type"] in _BLIND or any(_BLIND_PARTS.search(name) for there in parts for name in there)
    counted = any(f".{_POSITIONS}." in name for name in outside)  # the model counts the positions itself
    family = Family(
        model_type=str(config["model_type"]),
        architecture=architecture,
        tensors=frozenset({*of_layers, *outside, *of_head, f"{head}.weight"}),
        task=task,
        body=body,
        head=head,
        embedding=embedding,
        layers=layers,
        norm=norm,
        mlp=mlp,
        row_projections=rows,
        row_parts=row_parts,
        down_projection=down,
        keeps_apart=everywhere and not blind and not counted,
        experts=experts,
        dense_layers=bool(plain),
        adapted_attention=adapted_linears(attention.name, parts, experts=experts is not None),
        attention=attention.name,
        attention_projections=attention.projections,
        whole_groups=attention.whole,
        no_low_rank=attention.unlike,
        attention_norm=norms.attention_norm,
        attention_norm_after=norms.attention_norm_after,
        mlp_norm=norms.mlp_norm,
        mlp_norm_after=norms.mlp_norm_after,
        no_sequence="it has experts" if experts else norms.no_sequence,
    )
    queries = int(config["num_attention_heads"])
    usual = {"num_key_value_heads": queries, "head_dim": config["hidden_size"] // queries}
    silent = {key: value for key, value in attention.stated.items() if value != usual[key]}
    silent["tie_word_embeddings"] = not of_head
    told = {key: value for key, value in silent.items() if config.get(key) is None}
    return family, told | _overridden(config, family, parts[0])


def _overridden(config: Mapping[str, Any], family: Family, first: Shapes) -> dict[str, Any]:
    """The values of keys that mean something else in config.json than here."""
    told: dict[str, Any] = {key: 0 for key in _PREDICTING if config.get(key)}
    if config.get("block_auto_adjust_ff_dim", config["model_type"] == "lfm2"):
        width = first[f"{family.mlp}.{family.down_projection}.weight"][1]
        told |= {"block_auto_adjust_ff_dim": False, "intermediate_size": width}
        told |= {"block_ff_dim": width} if "block_ff_dim" in config else {}
    return told


class _Search:
    """A search through a checkpoint's tensors, which raises a fitting error if something is missing."""

    def __init__(self, config: Mapping[str, Any], shapes: Shapes, where: str) -> None:
        self._config = config
        self._hidden_size = config["hidden_size"]
        self.shapes = {name: shape for name, shape in shapes.items() if not name.endswith(BUFFERS)}
        self.refuse = partial(not_supported, config, where)

    def architecture(self, task: str) -> str:
        """The stem of the architecture's class names."""
        if self._config["model_type"] in _CLASSES:
            return _CLASSES[self._config["model_type"]]
        name = str((self._config.get("architectures") or [""])[0])
        found = re.fullmatch(rf"(?:Pruned)?(\w+){task}", name)
        if found is None:
            raise self.refuse(f"architectures is {name!r}, which doesn't end in {task}")
        return found[1]

    def stack(self) -> str:
        """The beginning of the names of a layer's tensors, before the layer's number."""
        count = self._config["num_hidden_layers"]
        numbers: dict[str, set[int]] = {}
        for name in self.shapes:
            if found := re.match(r"((?:(?!mtp)\w+\.)*layers)\.(\d+)\.", name):
                numbers.setdefault(found[1], set()).add(int(found[2]))
        stacks = [prefix for prefix, there in numbers.items() if there.issuperset(range(count))]
        if len(stacks) == 1:
            return stacks[0]
        if len(numbers) == 1:
            ((prefix, there),) = numbers.items()
            missing = min({*range(count)} - there)
            raise self.refuse(f"num_hidden_layers is {count}, but {prefix}.{missing} is missing from the weight files")
        raise self.refuse(
            f"it doesn't have exactly one stack of {count} layers called layers.<number>: it has "
            f"{', '.join(sorted(numbers)) or min(self.shapes)}"
        )

    def parts_of_layers(self, layers: str) -> Sequence[Shapes]:
        """The tensors of each layer, by their names within it."""
        parts: list[dict[str, Sequence[int]]] = [{} for _ in range(self._config["num_hidden_layers"])]
        for name, shape in self.shapes.items():
            if name.startswith(f"{layers}."):
                number, _, part = name.removeprefix(f"{layers}.").partition(".")
                if number.isdigit() and int(number) < len(parts):
                    parts[int(number)][part] = shape
        return parts

    def require_alike(self, parts: Sequence[Shapes]) -> None:
        """Refuse a layer that lacks a tensor that others of its kind have: transformers would make it up, or, if it
        would choose keys, the layer attends to keys that an earlier one chose.
        """
        kinds = self._config.get("layer_types") or [""] * len(parts)
        for layer, there in enumerate(parts):
            for other, theirs in enumerate(parts):
                missing = sorted(theirs.keys() - there.keys())
                if self._config["model_type"] != _SHARING_CHOICES:
                    missing = [name for name in missing if not name.startswith(_CHOOSES)]
                if missing and there.keys() < theirs.keys() and kinds[layer] == kinds[other]:
                    raise self.refuse(f"tensor {missing[0]} of layer {layer}, which layer {other} has, is missing")

    def mlp(self, parts: Mapping[int, Shapes]) -> tuple[str, tuple[str, ...], str, int]:
        """The MLP that all of these layers have: its name, its row projections, its down projection, and the number of
        matrices in each row projection.
        """
        first = next(iter(parts.values()))
        for rows, down, row_parts in _MLPS:
            names = sorted(name for name in first if re.fullmatch(rf"(\w+\.)?{down}\.weight", name))
            for block in (name.removesuffix(f"{down}.weight") for name in names):
                if all(f"{block}{name}.weight" in first for name in rows):
                    self._require_plain(block, {*rows, down}, parts)
                    return block.removesuffix("."), rows, down, row_parts
        inside = ", ".join(sorted({name.rpartition(".")[0] for name in first if len(first[name]) > 1}))
        raise self.refuse(f"its layers have no MLP of a kind that is known (they have {inside})")

    def _require_plain(self, block: str, known: set[str], parts: Mapping[int, Shapes]) -> None:
        weights = {f"{block}{name}.weight" for name in known}
        expected = {f"{block}{name}.{part}" for name in known for part in ("weight", "bias")}
        for layer, there in parts.items():
            if missing := sorted(weights - there.keys()):
                raise self.refuse(f"layer {layer} has no {missing[0]}")
            inside = {name for name in there if block and name.startswith(block)}
            learned = {name for name in inside if _OF_ACTIVATION.fullmatch(name) and list(there[name]) in ([], [1])}
            if more := sorted(inside - expected - learned):
                raise self.refuse(f"in layer {layer}, {more[0]} is not part of a plain MLP")

    def outside_layers(self, layers: str) -> set[str]:
        """Names of the decoder's tensors outside its layers."""
        body = layers.rpartition(".")[0]
        apart = (f"{layers}.", *(f"{body}.{name}" for name in _PREDICTING_NAMES))
        return {name for name in self.shapes if name.startswith(f"{body}.") and not name.startswith(apart)}

    def norm(self, body: str, outside: set[str]) -> str:
        """Name of the final norm."""
        if bare := _BARE_NORMS.get(str(self._config["model_type"])):
            return f"{body}.{bare}"
        vectors = {name: list(self.shapes[name]) for name in outside if len(self.shapes[name]) == 1}
        wanted = [self._hidden_size]
        names = {name.rpartition(".")[0] for name, it in vectors.items() if name.endswith(".weight") and it == wanted}
        if len(names) != 1:
            raise self.refuse(f"it doesn't have exactly one norm of {wanted} after its layers (found: {vectors})")
        return names.pop()

    def embedding(self, outside: set[str]) -> str:
        """Name of the table of token embeddings."""
        wanted = [self._config["vocab_size"], self._hidden_size]
        tables = [name for name in outside if len(self.shapes[name]) == 2 and f".{_POSITIONS}." not in name]
        found = [name for name in tables if list(self.shapes[name]) == wanted]
        if len(found) != 1:
            there = ", ".join(f"{name} {list(self.shapes[name])}" for name in sorted(tables)) or "none"
            raise self.refuse(
                "it doesn't have exactly one table of embeddings of vocab_size and hidden_size "
                f"{wanted} (tables: {there})"
            )
        return found[0].removesuffix(".weight")

    def head(self, body: str) -> str:
        """Name of the projection to the vocabulary."""
        wanted = [self._config["vocab_size"], self._hidden_size]
        found = {name for name, shape in self.shapes.items() if name.endswith(".weight") and list(shape) == wanted}
        names = {name.removesuffix(".weight") for name in found if not name.startswith(f"{body}.")}
        return names.pop() if len(names) == 1 else _HEADS.get(str(self._config["model_type"]), "lm_head")

    def require_nothing_else(self, outside: set[str], known: set[str]) -> None:
        """Refuse parts that act between layers, which passes that run one layer at a time would miss."""
        embedded, shared = (self._config.get(key) for key in ("word_embed_proj_dim", "num_kv_shared_layers"))
        if embedded not in (None, self._hidden_size):
            raise self.refuse(f"its embeddings are of another size than its layers (word_embed_proj_dim {embedded})")
        if shared:
            raise self.refuse(f"its last {shared} layers read keys and values of others (num_kv_shared_layers)")
        modules = {name: name.rpartition(".")[0] for name in outside}
        more = [name for name, it in modules.items() if it not in known and not it.endswith(f".{_POSITIONS}")]
        if more:
            raise self.refuse(f"beside its layers it has {min(more)}")

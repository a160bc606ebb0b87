"""Locating the parts of an unlisted architecture by the names and shapes of a checkpoint's tensors.

A tensor's name tells what it is, and its shape confirms it. Names can't tell how the parts work together; that is
checked when the model runs: each layer against the whole model (``distributed.whole_model_probe``), and the head
against the model's logits (``models.after_head``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfprune_dist.checkpoints.discovered_blocks import Attention, Shapes, adapted_linears, norms_of
from hfprune_dist.checkpoints.expert_discovery import find_experts
from hfprune_dist.checkpoints.families import CAUSAL, WITH_VISION, Family
from hfprune_dist.checkpoints.refusals import Refusals
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
_BLIND_PARTS = r"conv1d\.|\.A_log$|\.slope_rate$|\.indexer\."
_BLIND = ("afmoe", "gpt_oss", "granitemoehybrid")
# Architectures in which a layer that doesn't choose keys itself attends to those that an earlier layer chose.
_SHARING_CHOICES, _CHOOSES = ("glm_moe_dsa",), "self_attn.indexer."
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
# Stand-in for the MLP of a mixture of experts in which no layer has a plain MLP.
_BESIDE_EXPERTS = ("mlp", ("gate_proj", "up_proj"), "down_proj", 1)
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
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith(BUFFERS)}
    refusals = Refusals(config, where)
    search = _Search(config, shapes, refusals)
    architecture, task = search.architecture(has_vision)
    layers = search.prefix()
    body = layers.rpartition(".")[0]
    apart = (f"{layers}.", *(f"{body}.{name}" for name in _PREDICTING_NAMES))
    outside = {name for name in shapes if name.startswith(f"{body}.") and not name.startswith(apart)}
    embedding = search.embedding(outside)
    tensors = search.parts_of_layers(layers)
    search.check_choices(tensors)
    parts = [with_products(config, there) for there in tensors]
    experts = find_experts(config, parts, refusals)
    plain = {layer: there for layer, there in enumerate(parts) if experts is None or layer not in experts.layers}
    mlp, rows, down, row_parts = search.mlp(plain) if plain else _BESIDE_EXPERTS
    mlp = experts.module.rpartition(".")[0] if experts else mlp
    attention, norms = Attention.of(config, parts), norms_of(config, parts, mlp)
    norm = search.norm(body, outside)
    search.check_outside(outside, {norm, embedding})
    of_layers = {f"{layers}.{layer}.{name}" for layer, there in enumerate(tensors) for name in there}
    head = search.head(body)
    of_head = {name for name in shapes if name.startswith(f"{head}.")}
    family = Family(
        model_type=str(config["model_type"]),
        architecture=architecture,
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
        heads=attention.heads,
        any_heads=config["hidden_size"] % int(config["num_attention_heads"]) != 0,
        found=frozenset(of_layers | outside | of_head),
        keeps_apart=search.keeps_apart(parts, attention, outside),
        experts=experts,
        dense_layers=bool(plain),
        adapted_attention=adapted_linears(attention, parts, experts=experts is not None),
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
    return family, _stated(config, family, parts[0], of_head)


def _stated(config: Mapping[str, Any], family: Family, parts: Shapes, head: set[str]) -> dict[str, Any]:
    """The second result of ``discover``."""
    silent: dict[str, Any] = {"tie_word_embeddings": not head}
    queries = int(config["num_attention_heads"])
    if family.heads.get("num_key_value_heads", queries) != queries:
        silent["num_key_value_heads"] = family.heads["num_key_value_heads"]
    if family.heads.get("head_dim", config["hidden_size"] // queries) != config["hidden_size"] // queries:
        silent["head_dim"] = family.heads["head_dim"]
    told = {key: value for key, value in silent.items() if config.get(key) is None}
    told |= {key: 0 for key in _PREDICTING if config.get(key)}
    if config.get("block_auto_adjust_ff_dim", False) or (
        config["model_type"] == "lfm2" and "block_auto_adjust_ff_dim" not in config
    ):
        width = parts[f"{family.mlp}.{family.down_projection}.weight"][1]
        told |= {"block_auto_adjust_ff_dim": False, "intermediate_size": width}
        told |= {"block_ff_dim": width} if "block_ff_dim" in config else {}
    return told


class _Search:
    """A search through a checkpoint's tensors, which raises a fitting error if something is missing."""

    def __init__(self, config: Mapping[str, Any], shapes: Shapes, refusals: Refusals) -> None:
        self._config = config
        self._shapes = shapes
        self._refusals = refusals
        self._hidden_size = config["hidden_size"]

    def architecture(self, has_vision: bool) -> tuple[str, str]:
        """The stem and the ending of the architecture's class names."""
        task = WITH_VISION if has_vision else CAUSAL
        if self._config["model_type"] in _CLASSES:
            return _CLASSES[self._config["model_type"]], task
        names = self._config.get("architectures") or [""]
        found = re.fullmatch(rf"(?:Pruned)?(\w+){task}", str(names[0]))
        if found is None:
            raise self._refusals.unsupported(f"architectures is {names[0]!r}, which doesn't end in {task}")
        return found[1], task

    def prefix(self) -> str:
        """The beginning of the names of a layer's tensors, before the layer's number."""
        wanted = range(self._config["num_hidden_layers"])
        numbers: dict[str, set[int]] = {}
        for name in self._shapes:
            if found := re.match(r"((?:(?!mtp)\w+\.)*layers)\.(\d+)\.", name):
                numbers.setdefault(found[1], set()).add(int(found[2]))
        stacks = [prefix for prefix, there in numbers.items() if there.issuperset(wanted)]
        if not stacks and len(numbers) == 1:
            ((prefix, there),) = numbers.items()
            missing = min({*wanted} - there)
            raise self._refusals.unlike_tensors(
                f"num_hidden_layers is {len(wanted)}, and they have no {prefix}.{missing}"
            )
        if not numbers:
            numbered = [name for name in self._shapes if re.search(r"\.\d+\.", name)]
            example = min(numbered or self._shapes)
            raise self._refusals.unsupported(
                f"no tensor is of a layer called layers.<number> (there is, for example, {example})"
            )
        if len(stacks) != 1:
            found_here = ", ".join(sorted(numbers))
            raise self._refusals.unsupported(
                f"it doesn't have exactly one stack of {len(wanted)} layers (tensors of: {found_here})"
            )
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

    def check_choices(self, parts: Sequence[Shapes]) -> None:
        """Refuse layers that attend to keys that another one chose, which passes that run one layer at a time lack."""
        if self._config["model_type"] not in _SHARING_CHOICES:
            return
        sharing = [number for number, there in enumerate(parts) if not any(it.startswith(_CHOOSES) for it in there)]
        if sharing:
            raise self._refusals.unsupported(
                f"layer {sharing[0]} attends to keys that an earlier one chose (it has no {_CHOOSES.rstrip('.')})"
            )

    def mlp(self, parts: Mapping[int, Shapes]) -> tuple[str, tuple[str, ...], str, int]:
        """The MLP that all of these layers have: its name, its row projections, its down projection, and the number of
        matrices in each row projection.
        """
        first = next(iter(parts.values()))
        for rows, down, row_parts in _MLPS:
            names = sorted(name for name in first if re.fullmatch(rf"(\w+\.)?{down}\.weight", name))
            for block in (name.removesuffix(f"{down}.weight") for name in names):
                weights = [f"{block}{name}.weight" for name in (*rows, down)]
                if all(weight in first for weight in weights):
                    self._check_mlp(block, {*rows, down}, weights, parts)
                    self._check_width(weights, parts, row_parts)
                    return block.removesuffix("."), rows, down, row_parts
        inside = ", ".join(sorted({name.rpartition(".")[0] for name in first if len(first[name]) > 1}))
        raise self._refusals.unsupported(f"its layers have no MLP of a kind that is known (they have {inside})")

    def _check_mlp(self, block: str, known: set[str], weights: Sequence[str], parts: Mapping[int, Shapes]) -> None:
        first = min(parts)
        for layer, there in parts.items():
            if missing := [name for name in weights if name not in there]:
                raise self._refusals.unsupported(f"layer {layer} has no {missing[0]}, which layer {first} has")
            expected = {f"{block}{name}.{part}" for name in known for part in ("weight", "bias")}
            inside = {name for name in there if block and name.startswith(block) and not _is_of_activation(name, there)}
            if more := sorted(inside - expected):
                raise self._refusals.unsupported(f"in layer {layer}, {more[0]} is not part of a plain MLP")

    def _check_width(self, weights: Sequence[str], parts: Mapping[int, Shapes], row_parts: int) -> None:
        first = min(parts)
        *rows, down = (parts[first][name] for name in weights)
        if len(down) != 2:
            raise self._refusals.unsupported(
                f"{weights[-1]} of layer {first} has shape {list(down)}, which is not a matrix's"
            )
        width = down[1] * row_parts
        wanted = [width, self._hidden_size]
        for name, row in zip(weights, rows, strict=False):
            if list(row) != wanted:
                raise self._refusals.unsupported(f"{name} of layer {first} has shape {list(row)}, not {wanted}")

    def norm(self, body: str, outside: set[str]) -> str:
        """Name of the final norm."""
        if bare := _BARE_NORMS.get(str(self._config["model_type"])):
            return f"{body}.{bare}"
        found = [name for name in outside if list(self._shapes[name]) == [self._hidden_size]]
        names = {name.rpartition(".")[0] for name in found if name.endswith(".weight")}
        if len(names) != 1:
            raise self._refusals.unsupported(
                f"it doesn't have exactly one norm with a weight after its layers (found: {sorted(found)})"
            )
        return names.pop()

    def embedding(self, outside: set[str]) -> str:
        """Name of the table of token embeddings."""
        wanted = [self._config.get("vocab_size"), self._hidden_size]
        found = [name for name in outside if name.endswith(".weight") and list(self._shapes[name]) == wanted]
        tables = [name for name in outside if len(self._shapes[name]) == 2 and f".{_POSITIONS}." not in name]
        if not found and len(tables) == 1:
            raise self._refusals.unlike_tensors(
                f"{tables[0]} has shape {list(self._shapes[tables[0]])}, but vocab_size and hidden_size are {wanted}"
            )
        if len(found) != 1:
            raise self._refusals.unsupported(f"it doesn't have exactly one table of embeddings of shape {wanted}")
        return found[0].removesuffix(".weight")

    def head(self, body: str) -> str:
        """Name of the projection to the vocabulary."""
        wanted = [self._config.get("vocab_size"), self._hidden_size]
        found = {name for name, shape in self._shapes.items() if name.endswith(".weight") and list(shape) == wanted}
        names = {name.removesuffix(".weight") for name in found if not name.startswith(f"{body}.")}
        return names.pop() if len(names) == 1 else _HEADS.get(str(self._config["model_type"]), "lm_head")

    def keeps_apart(self, parts: Sequence[Shapes], attention: Attention, outside: set[str]) -> bool:
        """See ``Family``. Layers without attention, and some with it, carry state from one sequence into the next, and
        models with a table of positions count the positions themselves.
        """
        everywhere = all(any(name.startswith(f"{attention.name}.") for name in there) for there in parts)
        blind = str(self._config["model_type"]) in _BLIND or any(
            re.search(_BLIND_PARTS, name) for there in parts for name in there
        )
        return everywhere and not blind and not any(f".{_POSITIONS}." in name for name in outside)

    def check_outside(self, outside: set[str], known: set[str]) -> None:
        """Refuse parts that act between layers, which passes that run one layer at a time would miss."""
        embedded = self._config.get("word_embed_proj_dim")
        if embedded not in (None, self._hidden_size):
            raise self._refusals.unsupported(
                f"its embeddings are of another size than its layers (word_embed_proj_dim {embedded})"
            )
        modules = {name: name.rpartition(".")[0] for name in outside}
        more = [name for name, it in modules.items() if it not in known and not it.endswith(f".{_POSITIONS}")]
        if more:
            raise self._refusals.unsupported(f"beside its layers it has {sorted(more)[0]}")
        shared = self._config.get("num_kv_shared_layers")
        if shared:
            raise self._refusals.unsupported(
                f"its last {shared} layers read keys and values of others (num_kv_shared_layers)"
            )


def _is_of_activation(name: str, there: Shapes) -> bool:
    """Whether a tensor of an MLP is a single parameter of its activation."""
    return _OF_ACTIVATION.fullmatch(name) is not None and list(there[name]) in ([], [1])

"""The config.json of a smaller checkpoint: which shapes a plain one can have, and its content; without torch.

A plain checkpoint is one that transformers, and every engine built for its architecture, loads without our code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import FAMILIES, Family
from hfprune_dist.checkpoints.layer_settings import of_layers, undroppable_layers
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.low_rank import rank_field
from hfprune_dist.structures.units import LAYER_SIZES, OUTPUT_BIASES, PER_LAYER

# Our module that travels inside every checkpoint that isn't plain.
MODELING_FILE = Path(__file__).with_name("modeling_pruned.py")
AUTO_CLASS = "AutoModelForCausalLM"
QUERY_HEADS_KEY = "num_attention_heads"
# The key with which transformers lets fields that are in ``PER_LAYER`` be read for all layers too.
_READ_GLOBALLY = "allow_global_per_layer_attribute_access"
# Keys that the configuration class of a family's twin doesn't have.
_NOT_OF_A_TWIN = ("attention_bias", "mlp_bias", "pretraining_tp")
# Defaults of LlamaConfig that its twin doesn't share.
_DEFAULTS_OF_A_TWIN = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
# The version whose form a twin's config.json has. With one before 5, transformers suspects a faulty tokenizer.
_TRANSFORMERS = "5.24.0"


def plain_group_counts(checkpoint: Checkpoint) -> list[int]:
    """The numbers of KV groups, ascending, that every layer of a plain checkpoint can have."""
    groups = checkpoint.structures["kv_groups"]
    if not groups.fields:  # none can be removed
        return [min(groups.counts)]
    return [
        count
        for count in range(1, min(groups.counts) + 1)
        if _plain_type(checkpoint, groups.values([count])[QUERY_HEADS_KEY][0]) is not None
    ]


def is_plain(checkpoint: Checkpoint, shape: Shape) -> bool:
    """Whether a model of this shape can be written as a plain checkpoint."""
    if shape.ranks:
        return False
    values = _values(checkpoint, shape)
    is_uniform = all(len({*row} - {0}) == 1 for row in values.values()) and not checkpoint.config.get(OUTPUT_BIASES)
    return is_uniform and _plain_type(checkpoint, values[QUERY_HEADS_KEY][0]) is not None


def pruned_config(checkpoint: Checkpoint, shape: Shape, biased: Iterable[str] = ()) -> dict[str, Any]:
    """The complete settings of a checkpoint that is pruned to this shape, in the form of ``Checkpoint.config``.

    Args:
        biased: names within a layer of the output projections that have biases after pruning.
    """
    gone = set(range(checkpoint.num_layers)).difference(shape.layers)
    needed = gone & undroppable_layers(checkpoint.config).keys()
    assert not needed, f"layers {sorted(needed)} can't be dropped"
    values, stated = _values(checkpoint, shape), _without_ours(checkpoint)
    stated |= of_layers(stated, shape.layers) if gone else {}
    known = checkpoint.family.completed(stated)
    changed = {field: row for field, row in values.items() if any(value not in (0, known[field]) for value in row)}
    if QUERY_HEADS_KEY in changed:
        stated |= checkpoint.structures["kv_groups"].implied
    added = [module for module in biased if not _has_bias(checkpoint, module)]
    stated |= {OUTPUT_BIASES: [*stated.get(OUTPUT_BIASES, ()), *added]} if added else {}
    if added or not is_plain(checkpoint, shape):
        name = checkpoint.family.pruned_class
        classes = {AUTO_CLASS: name, "AutoModel": checkpoint.family.pruned_body}
        auto_map = {auto: f"{MODELING_FILE.stem}.{ours}" for auto, ours in classes.items()}
        stated |= _heads_for_vllm(changed, checkpoint.structures["kv_groups"].fields)
        changed |= {rank_field(projection): list(ranks) for projection, ranks in shape.ranks.items()}
        return stated | {LAYER_SIZES: changed, "architectures": [name], "auto_map": auto_map}
    stated |= {field: max(row) for field, row in changed.items()}
    model_type = _plain_type(checkpoint, values[QUERY_HEADS_KEY][0])
    return stated if model_type == checkpoint.family.model_type else _as_twin(stated, FAMILIES[str(model_type)])


def _heads_for_vllm(sizes: Mapping[str, list[int]], fields: Iterable[str]) -> dict[str, Any]:
    """Where vLLM, which makes caches and attention itself, reads how many heads each layer has."""
    heads = {field: sizes[field] for field in fields if field in sizes}
    if not heads:
        return {}
    layers = (dict(zip(heads, row, strict=True)) for row in zip(*heads.values(), strict=True))
    return {PER_LAYER: {str(number): layer for number, layer in enumerate(layers)}, _READ_GLOBALLY: True}


def parameters_of_biases(dense: Checkpoint, config: Mapping[str, Any]) -> int:
    """Number of parameters in biases that a model with ``config`` has and its dense original lacks."""
    added = [module for module in config.get(OUTPUT_BIASES, ()) if not _has_bias(dense, module)]
    return len(added) * int(config["num_hidden_layers"]) * int(config["hidden_size"])


def _has_bias(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a projection has a bias: as tensors say, since each architecture has settings of its own for that."""
    layers = range(checkpoint.num_layers)
    return all(checkpoint.units.tensor(layer, f"{module}.bias") in checkpoint.tensors for layer in layers)


def _values(checkpoint: Checkpoint, shape: Shape) -> dict[str, list[int]]:
    """Fields of config.json that say how many units there are -> their value in each layer that stays; 0 if the layer
    has no such units.
    """
    values: dict[str, list[int]] = {}
    for units in checkpoint.structures.values():
        for field, row in units.values(shape.counts(units)).items():
            pairs = list(zip(values.get(field, [0] * len(row)), row, strict=True))
            assert all(0 in pair or pair[0] == pair[1] for pair in pairs), f"two values of {field}"
            values[field] = [max(pair) for pair in pairs]
    values.setdefault(QUERY_HEADS_KEY, [int(checkpoint.config[QUERY_HEADS_KEY])] * len(shape.layers))
    return values


def _plain_type(checkpoint: Checkpoint, heads: int) -> str | None:
    """The model_type of a plain checkpoint with this many query heads; None if there is none."""
    family, config = checkpoint.family, checkpoint.config
    if family.any_heads or config["hidden_size"] % heads == 0:
        return family.model_type
    return None if family.biased(config) else family.twin


def _without_ours(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's settings without sizes per layer, for the plain class."""
    config = dict(checkpoint.config)
    if checkpoint.is_plain:
        return config
    left_out = (LAYER_SIZES, "auto_map", *((PER_LAYER, _READ_GLOBALLY) if _READ_GLOBALLY in config else ()))
    plain = {key: value for key, value in config.items() if key not in left_out}
    return plain | {"architectures": [checkpoint.family.plain_class]}


def _as_twin(config: Mapping[str, Any], twin: Family) -> dict[str, Any]:
    """The settings of the same model as its family's twin, whose configuration class has some defaults of its own."""
    known = {key: value for key, value in config.items() if key not in _NOT_OF_A_TWIN}
    return {
        **_DEFAULTS_OF_A_TWIN,
        **known,
        "model_type": twin.model_type,
        "architectures": [twin.plain_class],
        "sliding_window": None,
        "transformers_version": _TRANSFORMERS,
    }

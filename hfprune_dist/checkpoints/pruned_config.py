"""The JSON files of a smaller checkpoint, without torch: config.json, and kept.json, which lists what stayed.

A plain checkpoint is one that transformers, and every engine built for its architecture, loads without our code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.layer_settings import renumbered, undroppable_layers
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.structures import LAYERS
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.structures.low_rank import rank_field
from hfprune_dist.structures.units import LAYER_SIZES, OUTPUT_BIASES, PER_LAYER

KEPT = "kept.json"
# Our module that travels inside every checkpoint that isn't plain.
MODELING_FILE = Path(__file__).with_name("modeling_pruned.py")
AUTO_CLASS = "AutoModelForCausalLM"
QUERY_HEADS_KEY = "num_attention_heads"
# The key with which transformers lets fields that are in ``PER_LAYER`` be read for all layers too.
_READ_GLOBALLY = "allow_global_per_layer_attribute_access"
# Architectures whose configuration class accepts numbers of heads that don't divide the hidden size; for others, only
# a dense model with such a number shows it.
_ANY_HEADS = ("mistral", "qwen2", "qwen3")
# What computes the same as a llama without biases, with any number of heads; the keys that it doesn't have, and the
# llama's defaults where its own are others. With a version before 5, transformers suspects a faulty tokenizer.
_TWIN_OF_LLAMA = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
_NOT_OF_THE_TWIN = ("attention_bias", "mlp_bias", "pretraining_tp")
_DEFAULTS_OF_LLAMA = {"max_position_embeddings": 2048, "tie_word_embeddings": False}
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
    if shape.ranks or checkpoint.config.get(OUTPUT_BIASES):
        return False
    values = _values(checkpoint, shape)
    is_uniform = all(len({*row} - {0}) == 1 for row in values.values())
    return is_uniform and _plain_type(checkpoint, values[QUERY_HEADS_KEY][0]) is not None


def pruned_config(checkpoint: Checkpoint, shape: Shape, biased: Iterable[str] = ()) -> dict[str, Any]:
    """``Checkpoint.config`` for a shape; ``biased`` output projections, by their names within a layer, get biases."""
    gone = set(range(checkpoint.num_layers)).difference(shape.layers)
    needed = gone & undroppable_layers(checkpoint.config).keys()
    assert not needed, f"layers {sorted(needed)} can't be dropped"
    values, stated = _values(checkpoint, shape), plain_config(checkpoint)
    stated |= renumbered(stated, shape.layers) if gone else {}
    known = checkpoint.family.completed(stated)
    changed = {field: row for field, row in values.items() if any(value not in (0, known[field]) for value in row)}
    groups = checkpoint.structures["kv_groups"]
    if QUERY_HEADS_KEY in changed:
        stated["head_dim"] = known["head_dim"]  # which their number implied
    added = [module for module in biased if not _has_bias(checkpoint, module)]
    stated |= {OUTPUT_BIASES: [*stated.get(OUTPUT_BIASES, ()), *added]} if added else {}
    if added or not is_plain(checkpoint, shape):
        name = checkpoint.family.pruned_class
        classes = {AUTO_CLASS: name, "AutoModel": checkpoint.family.pruned_body}
        auto_map = {auto: f"{MODELING_FILE.stem}.{ours}" for auto, ours in classes.items()}
        if heads := {field: changed[field] for field in groups.fields if field in changed}:
            # Where vLLM, which makes caches and attention itself, reads how many heads each layer has.
            rows = enumerate(zip(*heads.values(), strict=True))
            own = {str(number): dict(zip(heads, row, strict=True)) for number, row in rows}
            stated |= {PER_LAYER: own, _READ_GLOBALLY: True}
        changed |= {rank_field(projection): list(ranks) for projection, ranks in shape.ranks.items()}
        return stated | {LAYER_SIZES: changed, "architectures": [name], "auto_map": auto_map}
    stated |= {field: max(row) for field, row in changed.items()}
    if _plain_type(checkpoint, values[QUERY_HEADS_KEY][0]) == checkpoint.family.model_type:
        return stated
    kept = {key: value for key, value in stated.items() if key not in _NOT_OF_THE_TWIN}
    return _DEFAULTS_OF_LLAMA | kept | _TWIN_OF_LLAMA | {"transformers_version": _TRANSFORMERS}


def parameters_of_biases(dense: Checkpoint, config: Mapping[str, Any]) -> int:
    """Number of parameters in biases that a model with ``config`` has and its dense original lacks."""
    added = [module for module in config.get(OUTPUT_BIASES, ()) if not _has_bias(dense, module)]
    return len(added) * int(config["num_hidden_layers"]) * int(config["hidden_size"])


def _has_bias(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a projection has a bias: as tensors say, since each architecture has settings of its own for that."""
    layers = range(checkpoint.num_layers)
    return all(checkpoint.units.tensor(layer, f"{module}.bias") in checkpoint.tensors for layer in layers)


def _values(checkpoint: Checkpoint, shape: Shape) -> dict[str, list[int]]:
    """Fields of config.json for numbers of units -> their value in each layer that stays; 0 where it has none."""
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
    config, own = checkpoint.config, checkpoint.family.model_type
    takes_any = own in _ANY_HEADS or config["hidden_size"] % int(config[QUERY_HEADS_KEY]) != 0
    if takes_any or config["hidden_size"] % heads == 0:
        return own
    is_biased = any(name.endswith(".bias") for name in checkpoint.tensors)
    return "mistral" if own == "llama" and not is_biased else None


def plain_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's settings without sizes per layer, for the plain class."""
    config = dict(checkpoint.config)
    if checkpoint.is_plain:
        return config
    left_out = (LAYER_SIZES, "auto_map", *((PER_LAYER, _READ_GLOBALLY) if _READ_GLOBALLY in config else ()))
    plain = {key: value for key, value in config.items() if key not in left_out}
    return plain | {"architectures": [checkpoint.family.plain_class]}


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json, with names from before transformers 5 too, unless one would change what transformers reads."""
    content = copy.deepcopy(dict(config))
    text = content.get("text_config", content)
    expected = _written_and_read(content, folder)
    for name, value in _earlier_names(text).items():
        if value is not None and name not in text:
            text[name] = value
            if _written_and_read(content, folder) != expected:
                del text[name]
    _written_and_read(content, folder)


def _earlier_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Earlier name -> value; of rope, where kinds of layers differ, it is that of full attention."""
    kinds = config.get("rope_parameters") or {}
    rope = dict(kinds.get("full_attention") or kinds)
    theta, rotated = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
    return {
        "rope_theta": theta,
        "rotary_emb_base": theta,
        "rope_local_base_freq": (kinds.get("sliding_attention") or {}).get("rope_theta"),
        "partial_rotary_factor": rotated,
        "rotary_pct": rotated,
        "rope_scaling": None if rope == {"rope_type": "default"} else rope or None,
        "num_experts": config.get("num_local_experts"),
        "torch_dtype": config.get("dtype"),
    }


def _written_and_read(content: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Write config.json, and return what transformers makes of it; None if it refuses it."""
    from transformers import AutoConfig

    # Not by write_json: it refuses infinite numbers, which transformers before 5 wrote as they are (bamba).
    (folder / "config.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    try:
        read: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    except Exception:  # which ones a configuration class raises isn't documented
        return None
    return read


def write_kept(folder: Path, kept: Kept) -> None:
    """Write ``kept.json``: each axis that may shrink -> the indices that stay, as the model that was cut has them."""
    axes = {axis: kept_K.tolist() for axis, kept_K in kept.axes.items()}
    write_json(folder / KEPT, {LAYERS: list(kept.layers), **axes})


def read_kept(folder: Path) -> dict[str, list[int]]:
    """Read ``kept.json``."""
    axes: dict[str, list[int]] = read_json(folder / KEPT)
    return axes

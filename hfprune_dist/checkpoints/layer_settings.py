"""Settings of a config.json that depend on layer numbers, and how dropping layers changes them; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfprune_dist.checkpoints.text_decoder import DEEPSTACK
from hfprune_dist.structures.units import PER_LAYER

# Lists with one entry per layer.
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta", "num_attention_heads_per_layer")
# The number of leading layers of one kind.
OF_THE_FIRST = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")
# Architectures whose layers from max_window_layers on have a sliding window -> their classes' default for it.
_WINDOWS_FROM = {"qwen2": 28, "qwen3": 28, "qwen2_5_vl_text": 80}
# Intervals at which layers of another kind recur -> the list that states the same explicitly, if there is one.
_INTERVALS = {
    "no_rope_layer_interval": "no_rope_layers",
    "full_attention_interval": "layer_types",
    "sliding_window_pattern": "layer_types",
}
# Architectures whose classes derive a layer's kind from its number if config.json lacks a list -> that list.
_UNLISTED = {"smollm3": "no_rope_layers"} | dict.fromkeys(
    (
        *("cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "granite_swa"),
        *("lfm3", "olmo3", "qwen3_5_text", "vaultgemma"),
    ),
    "layer_types",
)
# Architectures whose classes give the last layer full attention, whatever config.json says.
_FULL_AT_THE_END = ("gemma4_text", "gemma4_unified_text")
# Lists of the numbers of the layers with attention, where others have none; and the entries of layer_types for those.
ATTENTION_LAYER_LISTS = ("full_attn_idxs", "attn_layer_indices")
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention")
# The name that exaone's files use for the number of layers.
OTHER_LAYERS = "num_layers"
# Period at which layers have experts, or attention -> number of the first such layer.
PERIODS = {"expert_layer_period": "expert_layer_offset", "attn_layer_period": "attn_layer_offset"}


def undroppable_layers(config: Mapping[str, Any]) -> dict[int, str]:
    """Layers that can't be dropped, each with the reason, such as settings that tell layers apart by their number."""
    layers, model_type = range(int(config["num_hidden_layers"])), str(config.get("model_type"))
    by_number = [f"{key} {config[key]}" for key in PERIODS if config.get(key)]
    unlisted = [key for key, stated in _INTERVALS.items() if config.get(key) and not config.get(stated)]
    by_number += [f"{key} {config[key]}" for key in unlisted]
    if model_type in _UNLISTED and not config.get(_UNLISTED[model_type]):
        by_number.append(f"{model_type} without {_UNLISTED[model_type]}")
    if by_number:
        return dict.fromkeys(layers, f"{by_number[0]} tells layers apart by their number")
    if len(layers) == 1:
        return dict.fromkeys(layers, "it is the only one")
    if model_type in _FULL_AT_THE_END:
        return {layers[-1]: f"the last layer of a {model_type} has full attention, so another couldn't take its place"}
    first = len(config.get(DEEPSTACK) or ())
    stuck = dict.fromkeys(layers[:first], f"images enter behind the first {first} layers ({DEEPSTACK})")
    attending = _with_attention(config)
    if 0 < len(attending) < len(layers):
        stuck[attending[-1]] = "it is the last one with attention, without which caches can't count tokens"
    return stuck


def _with_attention(config: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers with attention, where config.json says which these are."""
    for numbers in ATTENTION_LAYER_LISTS:
        if config.get(numbers):
            return sorted(set(config[numbers]) & set(range(int(config["num_hidden_layers"]))))
    return [number for number, kind in enumerate(config.get("layer_types") or ()) if kind in _ATTENTION]


def renumbered(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """New values of the config.json keys that change if only these layers (ascending) stay, renumbered from 0."""
    changed: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if config.get(OTHER_LAYERS) == config["num_hidden_layers"]:
        changed[OTHER_LAYERS] = len(layers)
    changed |= {key: [config[key][layer] for layer in layers] for key in LISTS if config.get(key)}
    stated = {key: config[key] for key in OF_THE_FIRST if config.get(key) is not None}
    if config.get("use_sliding_window") and not config.get("layer_types") and config.get("model_type") in _WINDOWS_FROM:
        stated.setdefault("max_window_layers", _WINDOWS_FROM[config["model_type"]])  # the default, if it is missing
    changed |= {key: sum(layer < count for layer in layers) for key, count in stated.items()}
    for key in (key for key in ATTENTION_LAYER_LISTS if config.get(key)):
        changed[key] = [number for number, layer in enumerate(layers) if layer in config[key]]
    if settings := config.get(PER_LAYER):
        own = {str(number): settings[str(layer)] for number, layer in enumerate(layers) if str(layer) in settings}
        changed[PER_LAYER] = own
    return changed | _experts_of(config, layers)


def _experts_of(config: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Settings that say which of these layers have experts, where numbers say it; for several layers, a best effort."""
    if "moe_layer_start_index" in config:
        first, last, step = (config.get(f"moe_layer_{bound}") for bound in ("start_index", "end_index", "interval"))
        last = config["num_hidden_layers"] if last in (None, -1) else last
        has_experts = [(first or 0) <= layer <= last and (layer + 1) % (step or 1) == 0 for layer in layers]
        sparse = [number for number, has_some in enumerate(has_experts) if has_some] or [1, 0]
        return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": 1}
    periods = {period: offset for period, offset in PERIODS.items() if config.get(period)}
    if periods:
        own = {offset: int(layers[0] % config[period] != config.get(offset, 0)) for period, offset in periods.items()}
        return dict.fromkeys(periods, 2) | own
    step, without = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or []
    if step == 1 and not without:
        return {}
    plain = [number for number, layer in enumerate(layers) if layer in without or (layer + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": plain}

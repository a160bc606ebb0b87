"""Projections of low rank: in place of a matrix W [out, in], a checkpoint has two factors whose product stands for it.

Of ``q_proj`` with rank r it has ``q_proj.0.weight`` [r, in], which reads what W reads, and ``q_proj.1.weight``
[out, r], whose bias is W's. config.json says under ``layer_sizes`` which rank it has in each layer (``q_proj_rank``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfprune_dist.structures.units import LAYER_SIZES

# Modules of a projection of low rank, in the order in which they compute.
FACTORS = ("0", "1")


def rank_field(projection: str) -> str:
    """The field of ``layer_sizes`` with a projection's ranks."""
    return f"{projection.rpartition('.')[2]}_rank"


def read_ranks(config: Mapping[str, Any], block: str, projections: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Name within a layer of every projection of low rank -> its rank in each layer, by a config.json.

    Args:
        block: name within a layer of what has these projections.
    """
    sizes = config.get(LAYER_SIZES) or {}
    return {f"{block}.{name}": tuple(sizes[field]) for name in projections if (field := rank_field(name)) in sizes}


def linear_modules(projection: str, low_rank: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that compute a projection, the last one with its bias: itself, or its factors.

    Args:
        low_rank: has the names of those of low rank.
    """
    return tuple(f"{projection}.{factor}" for factor in FACTORS) if projection in low_rank else (projection,)


def with_products(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The tensors of a layer, name within it -> shape, as if its projections of low rank were whole.

    Args:
        config: a ``config.json``, which says which these are.
    """
    sizes, whole = config.get(LAYER_SIZES) or {}, dict(shapes)
    for name in shapes:
        projection = name.removesuffix(f".{FACTORS[0]}.weight")
        first, second = (f"{projection}.{factor}" for factor in FACTORS)
        factors = [shapes.get(f"{it}.weight", ()) for it in (first, second)]
        if rank_field(projection) in sizes and all(len(it) == len(FACTORS) for it in factors):
            inputs, outputs = whole.pop(f"{first}.weight")[1], whole.pop(f"{second}.weight")[0]
            whole[f"{projection}.weight"] = [outputs, inputs]
            whole |= {f"{projection}.bias": whole.pop(it) for it in (f"{second}.bias",) if it in whole}
    return whole


def factor_shapes(shape: Sequence[int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the factors of a matrix of such a shape [out, in]."""
    outputs, inputs = shape
    return (rank, inputs), (outputs, rank)

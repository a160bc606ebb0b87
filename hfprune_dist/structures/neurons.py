"""Neurons of gated MLPs: channels of the vector between an MLP's row projections and its down projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfprune_dist.structures.units import Block, Owned, Units, read_counts

# What configurations of lfm2 call it too, and read first.
_OLDER_NAME = "block_ff_dim"


def neurons(config: Mapping[str, Any], mlp: Block, row_projections: Sequence[str], down: str) -> Units:
    """The neurons of a model: each owns a row of every row projection, weight and bias, and a column of the down
    projection.

    Args:
        config: the model's ``config.json``.
        row_projections, down: names of its projections within the MLP; of the rows one alone, where gate and up are
            one matrix.
    """
    parts = 1 if len(row_projections) > 1 else 2
    return Units(
        kind="neurons",
        counts=read_counts(config, "intermediate_size"),
        rows=tuple(
            Owned(f"{mlp.name}.{name}.{part}", axis=0, parts=parts)
            for name in row_projections
            for part in ("weight", "bias")
        ),
        output=f"{mlp.name}.{down}",
        block=mlp,
        channels_per_unit=1,
        fields={field: 1 for field in ("intermediate_size", _OLDER_NAME) if field in config},
    )

"""Neurons of MLPs: channels of the vector between an MLP's row projections and its down projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.units import Block, Owned, Units, read_counts

# Names of ``intermediate_size`` in configurations of opt and granitemoehybrid; and a second one that lfm2 reads first.
OTHER_WIDTHS = ("ffn_dim", "shared_intermediate_size")
OLDER_WIDTHS = ("block_ff_dim",)
_OTHER_NAMES = (*OTHER_WIDTHS, *OLDER_WIDTHS)


def neurons(config: Mapping[str, Any], mlp: Block, row_projections: Sequence[str], down: str, parts: int = 1) -> Units:
    """Return the neurons of a model: each owns a row of every row projection, weight and bias, and a column of the
    down projection.

    Args:
        config: the model's ``config.json``.
        row_projections, down: names of the projections within the MLP; there is only one row projection if gate and up
            are one matrix, or if there is no gate.
        parts: number of matrices stacked in each row projection.
    """
    return Units(
        kind=NEURONS,
        counts=read_counts(config, "intermediate_size"),
        rows=tuple(
            Owned(mlp.within(f"{name}.{part}"), axis=0, parts=parts)
            for name in row_projections
            for part in ("weight", "bias")
        ),
        output=mlp.within(down),
        block=mlp,
        channels_per_unit=1,
        fields={field: 1 for field in ("intermediate_size", *_OTHER_NAMES) if field in config},
    )

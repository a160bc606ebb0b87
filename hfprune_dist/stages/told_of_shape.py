"""What the manifest of a stage that cuts tells of the shape that it leaves."""

from __future__ import annotations

from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.structures.kept import Shape


def told_of_shape(dense: Checkpoint, shape: Shape) -> dict[str, Any]:
    """Reached ratio, parameters and sizes; of kinds beside the neurons, and of layers, where some of them went."""
    told = {}
    if len(shape.layers) < dense.num_layers:
        told["num_hidden_layers"] = len(shape.layers)
    for kind, units in dense.structures.items():
        if kind in shape.units or kind == dense.units.kind:
            told |= units.sizes(shape.counts(units))
    counts = dense.parameter_counts
    return {"ratio_reached": counts.ratio(shape), "parameters": counts.of(shape), **told}

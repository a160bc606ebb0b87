"""Metrics of the shape that a pruning stage leaves, for its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import parameters_of_biases
from hfprune_dist.structures import EXPERTS
from hfprune_dist.structures.kept import Shape


def shape_metrics(
    model: Checkpoint, shape: Shape, config: Mapping[str, Any], dense: Checkpoint | None = None
) -> dict[str, Any]:
    """Reached ratio, parameters, and sizes; those of layers and of kinds other than neurons and experts if some went.

    Args:
        model: of which the shape is left.
        config: the ``config.json`` of what is left, which says whether biases were added.
        dense: what the model itself is left of; None: nothing went before.
    """
    dense = dense or model
    sizes = {}
    if len(shape.layers) < dense.num_layers:
        sizes["num_hidden_layers"] = len(shape.layers)
    for kind, units in model.structures.items():
        if kind in shape.units or kind in (model.units.kind, EXPERTS):
            sizes |= units.sizes(shape.counts(units))
    total, parameters = dense.parameters, model.parameter_counts.after(shape) + parameters_of_biases(model, config)
    return {"ratio_reached": (total - parameters) / total, "parameters": parameters, **sizes}

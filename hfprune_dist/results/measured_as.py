"""How a row is measured: rows that are measured alike can be compared."""

from __future__ import annotations

from hfprune_dist.store.stage import Stage


def measured_as(evaluation: Stage) -> object:
    """Everything that an evaluation's scores depend on besides the evaluated model."""
    inputs = {role: source.identity for role, source in evaluation.inputs.items() if role != "model"}
    return evaluation.version, evaluation.params.to_json(), inputs

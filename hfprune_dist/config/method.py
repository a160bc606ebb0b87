"""Methods: how scores become a smaller checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfprune_dist.config.section import Positive, Section
from hfprune_dist.core.criteria import CriterionName

Allocation = Literal["uniform", "global", "searched"]
Refit = Literal["none", "dense", "layerwise", "block"]


class Method(Section):
    """How scores become a smaller checkpoint. ``configs/methods`` has the ones that come with the project."""

    criterion: CriterionName
    """The score by which neurons stay: those with the highest scores."""
    allocation: Allocation = "uniform"
    """How the removed neurons are spread over layers. uniform: the same width everywhere. global: all layers compete
    by score; scores that aren't in nats are divided by their layer's mean first. searched: both of these, and widths
    around the global ones, are measured on calibration windows, and the widths closest to the dense model are taken.
    If layers differ in width, loading the checkpoint needs trust_remote_code or this package."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.2
    """global, searched: the smallest share of its neurons that a layer keeps."""
    protect_first: Annotated[int, Field(ge=0)] = 0
    """global, searched: number of layers, from the first on, that keep all their neurons."""
    protect_last: Annotated[int, Field(ge=0)] = 0
    """global, searched: number of layers, up to the last, that keep all their neurons."""
    refit: Refit = "none"
    """Least squares on down_proj, so that the kept neurons also do what the removed ones did. dense: fitted to the
    dense MLP's outputs, on the dense model's activations. layerwise: layer after layer, on the pruned model's own
    activations; the target lies half way between the dense MLP's output there and the output that would restore the
    dense model's hidden states. block: as layerwise, then Gauss-Newton steps on gate_proj, up_proj and down_proj
    together; takes minutes, not seconds."""
    multiple_of: Positive = 1
    """Round intermediate_size to a multiple of this (64 or 128 suit GPU kernels)."""
    steps: Positive = 1
    """Number of equal parts of the ratio in which the model is pruned. Before each part but the first, the pruned model
    is scored again on the same windows. A refit of kind ``dense`` then uses that model's activations; the others aim at
    the dense model in every step. Only with uniform."""
    distill: Annotated[int, Field(ge=0)] = 0
    """Passes over the calibration windows, after pruning, in which the pruned model learns the dense model's output
    distribution (see ``DistillationConfig``). It needs no labels and no further text, but it is training."""

    @model_validator(mode="after")
    def _steps_are_uniform(self) -> Method:
        if self.steps > 1 and self.allocation != "uniform":
            raise ValueError(
                f"steps: {self.steps} needs allocation: uniform; a checkpoint whose layers differ in width can't be "
                "pruned again"
            )
        return self


class PruneConfig(Section):
    """Settings that override those of every method; null keeps the method's (see ``Method``)."""

    criterion: CriterionName | None = None
    allocation: Allocation | None = None
    floor: Annotated[float, Field(gt=0, le=1)] | None = None
    protect_first: Annotated[int, Field(ge=0)] | None = None
    protect_last: Annotated[int, Field(ge=0)] | None = None
    refit: Refit | None = None
    multiple_of: Positive | None = None
    steps: Positive | None = None
    distill: Annotated[int, Field(ge=0)] | None = None

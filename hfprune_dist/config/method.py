"""Methods: how scores become a smaller checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfprune_dist.config.section import Positive, Section

# The keys of hfprune_dist.core.criteria.CRITERIA, which explains them; written out here since that one imports torch.
CriterionName = Literal[
    "entropy",
    "entropy_bfloat16",
    "entropy_squared",
    "cross_entropy",
    "fisher",
    "fisher_signs",
    "self_distillation",
    "activation",
    "surgeon",
    "magnitude",
    "random",
]
# Of these, the ones for which halves of the calibration windows can't be compared: they sum nothing over them, or round
# their sums (``Criterion.has_halves``).
WITHOUT_HALVES = frozenset({"entropy_bfloat16", "magnitude", "random"})


Allocation = Literal["uniform", "global", "searched"]
Refit = Literal["none", "dense", "layerwise", "block"]


class Method(Section):
    """How scores become a smaller checkpoint. ``configs/methods`` has the ones that come with the project."""

    criterion: CriterionName
    """The score that selects."""
    allocation: Allocation = "uniform"
    """How the removed neurons are spread over layers. uniform: the same width everywhere. global: all layers compete
    by score; a criterion whose scores aren't in nats is divided by its layer's mean first. searched: both of these and
    some widths around the global ones are measured on calibration windows, and those closest to the dense model are
    taken. Where layers differ in width, checkpoints need trust_remote_code, or this package, to load."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.2
    """global, searched: the share of its neurons that a layer keeps at least."""
    protect_first: Annotated[int, Field(ge=0)] = 0
    """global, searched: so many of the first layers keep all their neurons."""
    protect_last: Annotated[int, Field(ge=0)] = 0
    """global, searched: so many of the last layers keep all their neurons."""
    refit: Refit = "none"
    """Least squares on down_proj, so that the kept neurons take over for the removed ones. dense: they make the dense
    MLP's outputs of the dense model's activations. layerwise: layer after layer, they make of the pruned model's own
    activations what the dense MLP would put out, and half of what is missing besides to the dense model's hidden
    states. block: as layerwise, and steps of Gauss-Newton on gate_proj, up_proj and down_proj; takes minutes, not
    seconds."""
    multiple_of: Positive = 1
    """Round intermediate_size to a multiple of this (64 or 128 suit GPU kernels)."""
    steps: Positive = 1
    """Prune in so many equal parts of the ratio. Before each but the first the pruned model is scored anew, on the same
    windows. A refit of kind ``dense`` is then on that model's activations; the others aim at the dense model in every
    step. uniform alone."""
    distill: Annotated[int, Field(ge=0)] = 0
    """At the end, so many passes over the calibration windows in which the pruned model learns the dense one's output
    distribution (see ``DistillationConfig``). No labels and no further text, but it is training."""

    @model_validator(mode="after")
    def _steps_are_uniform(self) -> Method:
        if self.steps > 1 and self.allocation != "uniform":
            raise ValueError(
                f"steps: {self.steps} needs allocation: uniform; a checkpoint whose layers differ in width can't be "
                "pruned again"
            )
        return self


class PruneConfig(Section):
    """Settings that win over those of every method; null leaves them to the method (see ``Method``)."""

    criterion: CriterionName | None = None
    allocation: Allocation | None = None
    floor: Annotated[float, Field(gt=0, le=1)] | None = None
    protect_first: Annotated[int, Field(ge=0)] | None = None
    protect_last: Annotated[int, Field(ge=0)] | None = None
    refit: Refit | None = None
    multiple_of: Positive | None = None
    steps: Positive | None = None
    distill: Annotated[int, Field(ge=0)] | None = None

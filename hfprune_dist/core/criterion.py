"""What a criterion is: what it observes in the calibration pass, and how a unit's score follows from that.

Each method declares its criteria in its module of ``hfprune_dist.methods``. Planning reads these without torch, so
neither this module nor theirs imports it outside functions.

A unit is what pruning removes as a whole (``hfprune_dist.structures``): one or more channels of the vector h that a
layer's output projection reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.core.head import Batch, LogitGradient


@dataclass(frozen=True)
class Loss:
    """A function of a model's outputs, whose gradient is observed. Criteria with the same loss share one backward.

    Attributes:
        of_batch: micro-batch -> function of some of its tokens' logits: the loss per token, and its gradient there.
        is_mean: whether the mean over a window's tokens is differentiated, rather than the sum.
        of_student: whether it takes the outputs of a student that lacks some units, with the dense model as its
            teacher. Units are then observed in the student.
        unlabelled: number of tokens at the end of a window that have no loss.
        in_nats: whether its mean per token is in nats and worth reporting.
    """

    name: str
    of_batch: Callable[[Batch], LogitGradient]
    is_mean: bool = True
    of_student: bool = False
    unlabelled: int = 0
    in_nats: bool = True


@dataclass(frozen=True)
class Criterion:
    """A score per unit: what is observed, summed over tokens, and perhaps transformed afterwards.

    Attributes:
        units: the kinds of units that have scores.
        observes: the argument of ``reduce``, which is called several times and whose results are added up.
            "inputs": some tokens' h [tokens, channels]. "effects": their effects on the loss, to first order: h * dL/dh
            added up over each unit's channels [tokens, units]. "expert_outputs": what experts put out for their tokens
            [tokens, hidden_size], and their routing weights [tokens]. "weights": a micro-batch's weights of one layer
            that the units own, with the factors of their gradients (``core.linear_observer.OwnedRows``).
            "weight_gradients": nothing; gradients are summed over the whole pass, for ``score``. "nothing": no pass is
            needed.
        reduce: what is observed -> terms [tokens, sums], which are added up over a layer's tokens, or each expert's;
            for "weights", the sums themselves. ``score`` makes the units' scores of the sums.
        score: the sums and the layer -> scores, float64 [units]; None if the sums are the scores.
        loss: L, if gradients are observed.
        needs_moments: whether ``score`` needs the layer's Gram matrix and curvature, which may cost a second pass.
        student_by: for the loss of a student, the criterion whose scores from an earlier pass say what it lacks.
        in_nats: whether scores estimate KL divergence per token, a unit of measure that all layers share.
        in_deviations: whether scores are means over a unit's channels, in standard deviations of its layer's channels.
    """

    name: str
    units: frozenset[str]
    observes: Literal["inputs", "effects", "expert_outputs", "weights", "weight_gradients", "nothing"]
    reduce: Callable[..., Tensor] | None = None
    score: Callable[[Tensor, ScoredLayer], Tensor] | None = None
    loss: Loss | None = None
    needs_moments: bool = False
    student_by: str | None = None
    in_nats: bool = False
    in_deviations: bool = False

    def has_sums_of(self, kind: str) -> bool:
        """Return whether a pass adds up numbers for units of a kind, or for their channels."""
        return self.reduce is not None and kind in self.units


@dataclass(frozen=True)
class ScoredLayer:
    """One layer's units of one kind and their weights, which are read on demand.

    Attributes:
        number: the layer's number.
        units: number of its units.
        kind: their kind.
        seed: the sweep's.
        read_rows: returns the weights whose rows the units own, each [units * rows of a unit, hidden_size].
        read_columns: returns the weight of the output projection [hidden_size, units * channels of a unit].
        tokens: number of tokens that the sums are over.
        gram_DD: float64, the mean of h h^T over them, for a criterion that ``needs_moments``.
        curvature_CC: float64, the mean of g g^T, g the gradient of its loss at the output projection's output.
        read_gradients: for each weight of ``read_rows``, then that of ``read_columns``, a function that returns the
            gradient of the loss's mean over all windows, float64; for a criterion that observes "weight_gradients".
    """

    number: int
    units: int
    kind: str
    seed: int
    read_rows: Callable[[], list[Tensor]]
    read_columns: Callable[[], Tensor]
    tokens: int = 0
    gram_DD: Tensor | None = None
    curvature_CC: Tensor | None = None
    read_gradients: Sequence[Callable[[], Tensor]] = ()

    def column_norms(self, parts: int) -> Tensor:
        """Return the norms of ``parts`` equal consecutive parts of the output projection's columns, float64."""
        return norms(self.read_columns().unflatten(1, (parts, -1)), dim=(0, 2))

    def summed_per_unit(self, values_D: Tensor) -> Tensor:
        """Return the sum of values over each unit's channels [units]."""
        sums_U: Tensor = values_D.unflatten(0, (self.units, -1)).sum(dim=1)
        return sums_U


def norms(weight: Tensor, dim: int | tuple[int, ...], order: int = 2) -> Tensor:
    """Return norms over some dimensions, float64."""
    import torch

    values: Tensor = torch.linalg.vector_norm(weight, order, dim=dim, dtype=torch.float64)
    return values


def losses_of(criteria: Iterable[Criterion]) -> list[Loss]:
    """Return the losses of these criteria, each once; each takes a backward, and those of a student another forward."""
    return list(dict.fromkeys(criterion.loss for criterion in criteria if criterion.loss is not None))

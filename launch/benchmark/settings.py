"""The settings that every section of the benchmark gets, and what a model must be to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.shapes import uniform_shape
from hfprune_dist.structures import NEURONS

# Tokens per window, if the model has as many positions.
TOKENS = 1024
# The ratio at which neurons are kept, and weights are pruned.
RATIO = 0.2


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark.

    Attributes:
        model: folder of a checkpoint.
        text: file with plain text, long enough for windows of ``tokens``.
        tokens: tokens per window.
        rounds: measured rounds of each comparison, over which medians are taken.
        quick: fewer points on every axis.
        scratch: an empty folder on the same disk as the results.
    """

    model: str
    text: str
    tokens: int
    rounds: int
    quick: bool
    scratch: Path


def require_measurable(checkpoint: Checkpoint) -> None:
    """Refuse a model of the user's that isn't measured: the published formulation is about one MLP in each layer, and
    both formulations are compared at one width of all layers.

    Raises:
        UserError: saying why, and what to give instead.
    """
    where = f"--model {checkpoint.path}"
    if checkpoint.family.experts:
        raise UserError(f"{where}: a mixture of experts; give a model with one MLP in each layer")
    if not checkpoint.is_plain:
        raise UserError(f"{where}: its layers have been pruned to sizes of their own; give the model that it came from")
    uniform_shape(ShapeTarget(checkpoint, RATIO, (NEURONS,), 1, where))


def tokens_of(checkpoint: Checkpoint) -> int:
    """Tokens per window of a model."""
    return min(TOKENS, checkpoint.max_positions or TOKENS)

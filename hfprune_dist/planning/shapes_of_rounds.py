"""Shapes that a method's rounds may leave on the way to a ratio, each within a shape of the round before."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.plain_shapes import PlainShape, plain_shapes
from hfprune_dist.planning.rounds import round_ratios
from hfprune_dist.planning.targets import protected_by, target_of
from hfprune_dist.structures.kept import Shape


def local_shapes(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> list[Shape]:
    """Return the shape that each round of a method with ``allocation: local`` leaves.

    Args:
        method: with numbers, as ``with_numbers`` returns it.
        checkpoint: the dense model.

    Raises:
        UserError: as ``LocalTarget.shape`` does.
    """
    # Reports a ratio that is out of reach as such.
    LocalTarget(target_of(method, checkpoint, ratio, where), *protected_by(method)).shape()
    shapes: list[Shape] = []
    for reached in round_ratios(method, ratio):
        asked = target_of(method, checkpoint, reached, where)
        before = shapes[-1] if shapes else None
        shapes.append(LocalTarget(asked, *protected_by(method), before).shape())
    return shapes


def plain_shapes_of_rounds(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> list[list[PlainShape]]:
    """Return the shapes that may compete in each round with ``allocation: plain``, largest first; each round picks one.

    Args:
        method: with numbers, as ``with_numbers`` returns it.
        checkpoint: the dense model.

    Raises:
        UserError: as ``plain_shapes`` does, for any shape that the round before may leave.
    """
    plain_shapes(target_of(method, checkpoint, ratio, where))  # reports a ratio that is out of reach as such
    rounds: list[list[PlainShape]] = []
    for reached in round_ratios(method, ratio):
        asked = target_of(method, checkpoint, reached, where)
        left = rounds[-1] if rounds else [PlainShape.of(checkpoint)]
        rounds.append(sorted({shape for before in left for shape in plain_shapes(asked, before)}, reverse=True))
    return rounds

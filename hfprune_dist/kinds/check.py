"""Check: a checkpoint in engines that serve models, held against what transformers computes.

Inputs: ``model``.
"""

from __future__ import annotations

from hfprune_dist.config.method import EngineName
from hfprune_dist.kinds.memory import FLOAT32, Need, Planned, Sizes, StageParameters


class CheckParameters(StageParameters):
    """Settings of a check. The engines' versions are among its results."""

    engines: list[EngineName]

    def need(self, planned: Planned) -> Need:
        """Of transformers and each engine, one after the other, on a few tokens."""
        return Need(weights=Sizes.from_checkpoint(planned.dense).parameters * FLOAT32, activations=0, temporary=0)

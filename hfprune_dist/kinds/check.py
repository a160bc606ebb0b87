"""Check: a checkpoint in an engine that serves models, held against what transformers computes.

Inputs: ``model``.
"""

from __future__ import annotations

from hfprune_dist.config.method import EngineName
from hfprune_dist.config.section import Dtype
from hfprune_dist.kinds.memory import FLOAT32, Need, Planned, Sizes, StageParameters


class CheckParameters(StageParameters):
    """Settings of a check. The engine's version is among its results."""

    engine: EngineName

    @property
    def compute_dtype(self) -> Dtype | None:
        return "float32"

    def need(self, planned: Planned) -> Need:
        """Of transformers and the engine, one after the other, on a few tokens."""
        return Need(weights=Sizes.from_checkpoint(planned.dense).parameters * FLOAT32, activations=0, temporary=0)

"""Efficiency: speed and memory of a model that generates, next to its dense original.

Inputs: ``model``, and ``dense``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from hfprune_dist.config.method import EngineName
from hfprune_dist.config.schema import EfficiencyConfig
from hfprune_dist.config.section import Dtype
from hfprune_dist.kinds.memory import ITEMSIZE, Need, Planned, StageParameters, generation


class EfficiencyParameters(StageParameters):
    """Settings of a measurement of speed and memory: those of an ``EfficiencyConfig``, and the machine.

    ``engine``: what generates, its version is among the results; null: transformers.
    ``device``: as the planner knows it, the processor or GPU of this machine or what is requested from a cluster.
    """

    batch_setting: ClassVar[str] = "efficiency.batch_sizes"

    engine: EngineName | None
    batch_sizes: list[int]
    prompt_tokens: list[int]
    new_tokens: int
    repeats: int
    dtype: Dtype
    device: str

    @classmethod
    def from_config(cls, efficiency: EfficiencyConfig, device: str) -> EfficiencyParameters:
        return cls(
            batch_sizes=sorted(efficiency.batch_sizes),
            prompt_tokens=sorted(efficiency.prompt_tokens),
            **efficiency.model_dump(exclude={"enabled", "batch_sizes", "prompt_tokens"}),
            device=device,
        )

    def need(self, planned: Planned) -> Need:
        """Of two models in turn; a pruned one caches no more than the dense one."""
        tokens = max(self.prompt_tokens) + self.new_tokens
        need = generation(planned.dense, max(self.batch_sizes), tokens, ITEMSIZE[self.dtype])
        return replace(need, weights=2 * need.weights, gathered=None)

"""Efficiency: speed and memory of a model that generates, next to its dense original.

Inputs: ``model``, and ``dense``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.token_costs import TokenCosts
from hfprune_dist.config.schema import EfficiencyConfig
from hfprune_dist.config.section import Dtype
from hfprune_dist.kinds.dimensions import Dimensions
from hfprune_dist.kinds.memory import ITEMSIZE, Job, Memory, Planned, StageParameters, widest_of_a_token
from hfprune_dist.store.provenance import package_versions


class EfficiencyParameters(StageParameters):
    """Settings of a measurement of speed and memory: those of an ``EfficiencyConfig``, and the environment.

    ``device``: as the planner knows it, the processor or GPU of this machine or what is requested from a cluster.
    ``packages``: versions of the libraries that do the computing.
    """

    dtype_setting: ClassVar[str | None] = "efficiency.dtype"
    batch_setting: ClassVar[str] = "efficiency.batch_sizes"
    remedy: ClassVar[str] = "fewer efficiency.batch_sizes or tokens, or efficiency.enabled false"

    batch_sizes: list[int]
    prompt_tokens: list[int]
    new_tokens: int
    repeats: int
    dtype: Dtype
    device: str
    packages: dict[str, str | None]

    @classmethod
    def of(cls, efficiency: EfficiencyConfig, device: str) -> EfficiencyParameters:
        return cls(
            batch_sizes=sorted(efficiency.batch_sizes),
            prompt_tokens=sorted(efficiency.prompt_tokens),
            **efficiency.model_dump(exclude={"enabled", "batch_sizes", "prompt_tokens"}),
            device=device,
            packages=package_versions(("torch", "transformers")),
        )

    def job(self, planned: Planned) -> Generate:
        return Generate.of(self, planned.dense)


@dataclass(frozen=True)
class Generate(Job):
    """Two models in turn generate ``batch`` sequences, each ``tokens`` long in the end, all on rank 0.

    ``cached_channels``: what the dense model caches of a token (see ``TokenCosts``); a pruned one caches no more.
    """

    is_placed: ClassVar[bool] = False

    cached_channels: int = 0

    @classmethod
    def of(cls, params: EfficiencyParameters, dense: Checkpoint) -> Generate:
        """The job of a stage that measures the efficiency of this dense model, or of one pruned from it."""
        cached = TokenCosts.of(dense).cached_channels
        return cls(
            max(params.batch_sizes),
            max(params.prompt_tokens) + params.new_tokens,
            ITEMSIZE[params.dtype],
            cached_channels=cached,
        )

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on rank 0, however many others wait."""
        tokens = self.batch * self.tokens
        return Memory(
            weights=2 * dims.parameters * self.itemsize,
            activations=tokens * (self.cached_channels + widest_of_a_token(dims)) * self.itemsize,
            temporary=self.batch * dims.vocabulary * self.itemsize,
        )

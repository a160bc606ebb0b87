"""Needs of text generation: memory where efficiency is measured, and gathered bytes where a model is sharded."""

from __future__ import annotations

from dataclasses import dataclass

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.token_costs import TokenCosts
from hfprune_dist.config.parameters import EfficiencyParameters
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.core.memory_limits import WEIGHTS_SHARE
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gpu_needs import ITEMSIZE, Gpus, Memory
from hfprune_dist.planning.layer_pass_footprint import widest


@dataclass(frozen=True)
class Generate:
    """Two models in turn generate ``sequences`` at once, each ``tokens`` long in the end, all on rank 0.

    ``cached_channels``: what the dense model caches of a token (see ``TokenCosts``); a pruned one caches no more.
    """

    sequences: int
    tokens: int
    cached_channels: int
    itemsize: int = 2

    @classmethod
    def of(cls, params: EfficiencyParameters, dense: Checkpoint) -> Generate:
        """The job of a stage that measures the efficiency of this dense model, or of one pruned from it."""
        cached = TokenCosts.of(dense).cached_channels
        return cls(max(params.batch_sizes), params.most_tokens, cached, ITEMSIZE[params.dtype])

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """Memory on rank 0, however many others wait."""
        tokens = self.sequences * self.tokens
        return Memory(
            weights=2 * dims.parameters * self.itemsize,
            gathered=0.0,
            activations=tokens * (self.cached_channels + widest(dims)) * self.itemsize,
            scratch=self.sequences * dims.vocabulary * self.itemsize,
        )


def gathered_per_token(dims: Dimensions, itemsize: int, gpus: Gpus, runtime: RuntimeConfig) -> int:
    """Bytes of whole weights that every rank gathers for each token that a model generates in an evaluation.

    If ZeRO-3 shards the model, these are all its weights, however many sequences are generated at once; 0 if each rank
    has whole weights (see ``distributed.frozen_model.choose_sharding``; weights are taken to fit unknown GPU memory).
    """
    weights = dims.parameters * itemsize
    fits = not gpus.memory or weights <= WEIGHTS_SHARE * gpus.memory
    whole = runtime.sharding == "replicate" or (runtime.sharding == "auto" and fits)
    return 0 if whole or gpus.ranks == 1 else weights

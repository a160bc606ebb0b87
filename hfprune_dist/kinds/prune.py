"""Prune: cuts a model by its scores, refits what stays, and writes the checkpoint.

Inputs: ``model``, the dense model, and ``importance``, its scores and the windows that they were made on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field

from hfprune_dist.config.method import Method
from hfprune_dist.config.method_settings import Allocation, Refit, Structures
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import Dtype
from hfprune_dist.core.memory_limits import KEPT_BYTES
from hfprune_dist.kinds.dimensions import Dimensions
from hfprune_dist.kinds.importance import calibration_of
from hfprune_dist.kinds.memory import (
    FLOAT32,
    FLOAT64,
    ITEMSIZE,
    LayerPass,
    Memory,
    Planned,
    StageParameters,
    channels,
    one_layer,
    states,
    tokens_of_a_rank,
    widest_of_a_token,
)
from hfprune_dist.methods import MethodCriterion
from hfprune_dist.structures import KV_GROUPS, NEURONS

# About the most tokens that refits of norms see.
NORM_TOKENS = 2**15


class PruneParameters(StageParameters):
    """Settings of one cut: those of a ``Method`` that it depends on.

    ``ratio``: removed parameters / all of the dense model's. ``floor``, ``protect_first`` and
    ``protect_last`` are None if the allocation doesn't use them, ``dtype`` and ``micro_batch_size`` (windows per rank's
    forward pass) if no model runs. ``tensor_parallel`` divides ``multiple_of`` and the layers' numbers of KV groups; it
    is 1 if none are pruned. ``refit_iterations``: of conjugate gradients in the last Gauss-Newton step of refit: block.
    ``refit_copies``: copies of each calibration window, with redrawn tokens, that a refit sees as well.
    ``refit_norms``: whether the weights of all norms are refitted at the end.
    """

    dtype_setting: ClassVar[str | None] = "importance.dtype"
    remedy: ClassVar[str] = (
        "every rank has a layer's Gram matrices: GPUs with more memory, or a method with another refit, or none"
    )

    ratio: float
    criterion: MethodCriterion
    allocation: Allocation
    refit: Refit
    multiple_of: int
    floor: float | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    dtype: Dtype | None = None
    micro_batch_size: int | None = None
    structures: Structures = Field(default=[NEURONS])
    tensor_parallel: int = 1
    refit_iterations: int = 2
    refit_copies: int = 0
    refit_norms: bool = False

    @classmethod
    def of(cls, config: SweepConfig, method: Method, ratio: float) -> PruneParameters:
        """The cut of a method with numbers, as ``with_numbers`` returns it."""
        runs_model = method.refit != "none" or method.allocation in ("plain", "searched", "low_rank")
        return cls(
            ratio=ratio,
            **method.of_one_cut(),
            dtype=config.importance.dtype if runs_model else None,
            micro_batch_size=config.calibration.micro_batch_size if runs_model else None,
        )

    def forward_pass(self) -> tuple[Dtype, int]:
        """Compute dtype, and windows per forward pass of one rank, of a cut for which a model runs."""
        assert self.dtype is not None and self.micro_batch_size is not None, "planned as one for which none runs"
        return self.dtype, self.micro_batch_size

    def job(self, planned: Planned) -> Refitting | None:
        if self.refit == "none" and self.allocation != "low_rank":
            return None
        calibration, (dtype, windows) = calibration_of(planned, "importance"), self.forward_pass()
        samples = calibration.samples * (1 + self.refit_copies)
        return Refitting(
            batch=min(windows, samples),
            tokens=calibration.sequence_length,
            itemsize=ITEMSIZE[dtype],
            samples=samples,
            refit=self.refit,
            # A share of the model, taken from MLPs alone, leaves no more of each; where layers compete, all may stay.
            share_kept=1 - self.ratio if self.allocation == "uniform" else 1.0,
            kv_groups=KV_GROUPS in self.structures,
            searches=self.allocation in ("plain", "searched"),
            norms=self.refit_norms,
            low_rank=self.allocation == "low_rank",
        )


@dataclass(frozen=True)
class Refitting(LayerPass):
    """Windows layer by layer through the dense model, for biases or a refit, and for a refit of blocks the pruned one.

    Attributes:
        refit: what is fitted; ``layerwise`` and ``block`` run the pruned model as well as the dense one.
        share_kept: share of the widest layer's neurons that stays.
        kv_groups: whether attention's output projections are fitted, too.
        searches: whether shapes are measured before it, with refits of the dense model's layers.
        norms: whether a refit of norms follows.
        low_rank: whether attention gets matrices of low rank instead.
    """

    refit: Refit = "none"
    share_kept: float = 1.0
    kv_groups: bool = False
    searches: bool = False
    norms: bool = False
    low_rank: bool = False

    @property
    def _pursues(self) -> bool:
        return self.refit in ("layerwise", "block")

    def memory(self, dims: Dimensions, ranks: int) -> Memory:
        """See ``Job``; of the phase that needs most."""
        phases = [0.0]
        if self.low_rank:
            phases += self._low_rank(dims)
        if self.refit in ("dense", "layerwise", "block"):
            phases += self._least_squares(dims, ranks)
        if self.searches:
            sizes = channels(dims, self.kv_groups)
            grams, widest = sum(it**2 for it in sizes), max(sizes)
            phases.append(FLOAT64 * (2 * grams + 3 * widest**2 + 7 * dims.hidden_size * widest))
        if self.refit == "block":
            phases.append(self._step(dims, ranks))
        if self.norms:
            phases.append((dims.head_parameters + NORM_TOKENS // 32 * widest_of_a_token(dims)) * self.itemsize)
        return one_layer(self, dims, max(phases), models=1 + self._pursues)

    def host_bytes(self, dims: Dimensions, ranks: int) -> int:
        """See ``Job``; both models' states, those between blocks, and an MLP's inputs with its targets in float32."""
        steps = self.refit == "block"
        number = self.itemsize * (1 + self._pursues * (1 + self.kv_groups) + steps) + FLOAT32 * steps
        waiting = states(self, dims, self.samples, ranks) * number
        if dims.experts is not None and ranks > 1 and self.refit == "dense":  # matrices until each rank has a layer
            sizes = channels(dims, self.kv_groups)
            waiting += sum(2 * FLOAT64 * it**2 + self.itemsize * dims.hidden_size * it for it in sizes)
        if self.norms:  # before all layers, of both models
            seen = min(self.samples, max(1, NORM_TOKENS // self.tokens))
            waiting = max(waiting, (dims.num_layers + 4) * states(self, dims, seen, ranks) * self.itemsize)
        return waiting

    def _least_squares(self, dims: Dimensions, ranks: int) -> list[float]:
        """Gram matrices of windows that are fitted and of those that are held out, with those of a layer that waits;
        and a solve of the widest block, in float64.
        """
        sizes, hidden = channels(dims, self.kv_groups), dims.hidden_size
        kept = self.share_kept * max(sizes)
        if self._pursues:  # what the block reads, with the dense model's hidden states
            size, squares, products = kept + hidden, (kept + hidden) ** 2, 1 + (ranks > 1)
        else:
            size, squares, products = max(sizes), sum(it**2 for it in sizes), 1
        waits = ranks > 1 and not self._pursues and dims.experts is None
        solve = 2 * squares + 4 * kept**2 + hidden * (products * size + 6 * kept)
        return [2 * FLOAT64 * squares * (1 + waits), FLOAT64 * solve]

    def _step(self, dims: Dimensions, ranks: int) -> float:
        """A Gauss-Newton step: two Gram matrices of what stays, their inversion or the iterations, and what a rank
        keeps of its micro-batches.
        """
        kept = self.share_kept * dims.intermediate_size
        weights, tokens = dims.mlp_matrices * kept * dims.hidden_size, tokens_of_a_rank(self, self.samples, ranks)
        linearized = min(KEPT_BYTES, tokens * (dims.mlp_matrices * kept + dims.hidden_size) * self.itemsize)
        return 16 * kept**2 + max(36 * kept**2, 12 * kept**2 + 60 * weights) + linearized

    def _low_rank(self, dims: Dimensions) -> list[float]:
        """Layers' inputs in float64; the eigenvectors of the largest matrix, with the factors."""
        inputs = 2 * FLOAT64 * self.batch * self.tokens * max(dims.intermediate_size, dims.attention_size)
        rows = max(dims.hidden_size, dims.attention_size)
        return [inputs, FLOAT64 * (7 * rows**2 + 2 * dims.attention_parameters)]

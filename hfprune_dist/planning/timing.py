"""The time that a job takes for one micro-batch, from counted work and the rates of ``rates``."""

from __future__ import annotations

from dataclasses import dataclass

from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.footprint import TimedJob
from hfprune_dist.planning.gpu_needs import ITEMSIZE, Gpus
from hfprune_dist.planning.importance_footprint import Importance
from hfprune_dist.planning.operations import Operations
from hfprune_dist.planning.rates import (
    CALL_S,
    FLOAT32,
    FLOAT64,
    GATHER_S,
    GATHERED_LORA_MODULES,
    GATHERED_MODULES,
    LORA_MODULES,
    MODULES,
    NETWORK,
    PRODUCTS,
)
from hfprune_dist.planning.training_footprint import Train


@dataclass(frozen=True)
class Seconds:
    """Seconds that one rank spends on activities that overlap: the longest counts.

    Attributes:
        compute: the GPU's, for products in the compute dtype.
        network: for transferring what is gathered.
        launch: the host processor's, for calling modules and starting gathers.
    """

    compute: float
    network: float
    launch: float

    @property
    def longest(self) -> float:
        return max(self.compute, self.network, self.launch)

    @property
    def is_work(self) -> bool:
        """Whether the GPU's work hides everything else."""
        return self.longest == self.compute

    def __mul__(self, times: float) -> Seconds:
        return Seconds(times * self.compute, times * self.network, times * self.launch)


def seconds(job: TimedJob, dims: Dimensions, gpus: Gpus) -> Seconds:
    """Time of one micro-batch on each rank.

    Args:
        gpus: the GPUs that hold one copy of the model; their ``flops`` must be known.
    """
    work = job.work(dims)
    return Seconds(
        compute=work.flops / product_rate(gpus, job.itemsize),
        network=network_seconds(work.gathered_bytes, gpus),
        launch=_calls(job, dims, sharded=gpus.ranks > 1),
    )


def product_rate(gpus: Gpus, itemsize: int) -> float:
    """Floating-point operations per second that one GPU reaches in products of numbers of this size."""
    return nominal(gpus) * (PRODUCTS if itemsize == ITEMSIZE["bfloat16"] else FLOAT32)


def nominal(gpus: Gpus) -> float:
    """A GPU's rate in dense bfloat16, which must be known."""
    assert gpus.flops is not None, "the rate of a GPU is not known"
    return gpus.flops


def network_seconds(whole: float, gpus: Gpus) -> float:
    """Time to transfer bytes of which each rank receives (ranks - 1) / ranks, as in gathers and reduce-scatters.

    A ring over all ranks carries every byte once through each GPU's link and once through each node's.
    """
    slowest = gpus.link if gpus.nodes == 1 or gpus.network is None else min(gpus.link, gpus.network)
    return whole * (gpus.ranks - 1) / gpus.ranks / (NETWORK * slowest)


def precise_seconds(operations: Operations, gpus: Gpus, float32_share: float, float64_share: float) -> float:
    """Time of Gram matrices and solves, which don't overlap with anything.

    Args:
        float32_share: share of the windows on the rank that has the most.
        float64_share: share of the solves that ranks divide among them, on the rank that has the most.
    """
    in_float32 = operations.float32 * float32_share + operations.own_float32
    in_float64 = operations.float64 * float64_share + operations.own_float64
    return (in_float32 / FLOAT32 + in_float64 / FLOAT64) / nominal(gpus)


def _calls(job: TimedJob, dims: Dimensions, *, sharded: bool) -> float:
    """Time to call every layer's modules: once forward, once for each backward, and once more for a rerun."""
    modules, gathered = (LORA_MODULES, GATHERED_LORA_MODULES) if isinstance(job, Train) else (MODULES, GATHERED_MODULES)
    return _directions(job) * dims.num_layers * (modules * CALL_S + gathered * GATHER_S * sharded)


def _directions(job: TimedJob) -> int:
    if isinstance(job, Importance):
        backwards = job.losses + job.student
        return 1 + job.student + backwards * (1 + job.checkpointing)
    return 2 + job.checkpointing if isinstance(job, Train) else 1

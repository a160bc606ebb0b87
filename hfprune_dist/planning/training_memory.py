"""Fitting LoRA training into memory: where frozen weights lie, what is kept for backward, how many rows at a time.

Planning, estimating and running a training follow the same rule. Only the number of rows changes the result's bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import Sharding, SweepConfig
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.core.memory_limits import WEIGHTS_SHARE
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.footprint import fits
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.training_footprint import Train

# More rows at a time than this are hardly faster, so activations are not checkpointed for their sake. With whole
# weights, which need no gathering, fewer rows already keep a GPU busy for longer than its host needs to launch them.
ENOUGH_ROWS, ENOUGH_OF_WHOLE = 4, 2
MOST_ROWS = 64
AUTO = "auto"


@dataclass(frozen=True)
class Placement:
    """How a training uses memory.

    Attributes:
        whole: whether each rank has all frozen weights; otherwise they are sharded with ZeRO-3.
        checkpointing: whether layers keep only their inputs, and run again in backward.
        fits: whether this is expected to fit.
    """

    whole: bool
    checkpointing: bool
    fits: bool


def place(job: Train, dims: Dimensions, gpus: Gpus, sharding: Sharding) -> Placement:
    """The fastest placement that fits; if none does, the one that takes the least memory.

    Args:
        gpus: of all ranks.
        sharding: ``runtime.sharding``.
    """
    wholes = {"replicate": [True], "zero3": [False]}.get(sharding) or _to_choose_from(job, dims, gpus)
    ways = [Placement(whole, checkpointing, True) for whole in wholes for checkpointing in (False, True)]
    for way in ways:
        if fits(replace(job, checkpointing=way.checkpointing), dims, copy_of(way, gpus)):
            return way
    return replace(ways[-1], fits=False)


def _to_choose_from(job: Train, dims: Dimensions, gpus: Gpus) -> list[bool]:
    """Possible values of ``whole``, the fastest first. A single rank gains nothing from sharding."""
    if gpus.ranks == 1:
        return [True]
    return [True, False] if dims.parameters * job.itemsize <= WEIGHTS_SHARE * gpus.memory else [False]


def copy_of(way: Placement, gpus: Gpus) -> Gpus:
    """The GPUs that hold one copy of the frozen weights."""
    return replace(gpus, nodes=1, per_node=1) if way.whole else gpus


def chooses(config: SweepConfig) -> bool:
    """Whether the size of a LoRA training's micro-batch is still to be chosen."""
    return any(settings.micro_batch_size == AUTO for settings in _trainings(config).values())


def choose_micro_batches(
    config: SweepConfig, models: Sequence[Dimensions], gpus: Mapping[str, Gpus], methods: Iterable[Method] = ()
) -> SweepConfig:
    """The configuration with a number for every micro-batch size of LoRA training.

    Args:
        models: every dense model of the sweep; the one that leaves room for the fewest rows decides.
        gpus: section -> what its stages run on; a section is absent without GPUs, or if their memory is unknown.
        methods: the sweep's methods; all recoveries have the same rows, those that mask units (LoRAPrune) included.
    """
    masking = any(it.prunes_in == "recovery" for it in methods)
    tokens = {"recovery": config.recovery.sequence_length, "distillation": config.calibration.sequence_length}
    rows: dict[str, int | Literal["auto"]] = {}
    for section, settings in _trainings(config).items():
        where, one = gpus.get(section), settings.model_copy(update={"micro_batch_size": 1})
        job = Train.of(
            one, tokens[section], distills=section == "distillation", masks=masking and section == "recovery"
        )
        rows[section] = 1
        if where is not None:
            sharding, batch = config.runtime.sharding, settings.batch_size
            rows[section] = min(_most_rows(job, dims, where, batch, sharding) for dims in models)
    return with_micro_batches(config, rows)


def _trainings(config: SweepConfig) -> dict[str, LoraTraining]:
    return {"recovery": config.recovery, "distillation": config.distillation}


def with_micro_batches(config: SweepConfig, rows: Mapping[str, int | Literal["auto"]]) -> SweepConfig:
    """The configuration with these micro-batch sizes, by section, where they are still to be chosen."""
    open_to_choice = {name: it for name, it in _trainings(config).items() if it.micro_batch_size == AUTO}
    return config.model_copy(
        update={
            name: settings.model_copy(update={"micro_batch_size": rows[name]})
            for name, settings in open_to_choice.items()
            if name in rows
        }
    )


def _most_rows(job: Train, dims: Dimensions, gpus: Gpus, batch_size: int, sharding: Sharding) -> int:
    """A power of two that fits, that divides a step evenly among ranks, and for whose sake nothing is sharded.

    It is the largest, but no more than enough rows if layers would run again.
    """
    ways = {1: place(job, dims, gpus, sharding)}
    rows = 2
    while rows <= MOST_ROWS and batch_size % (rows * gpus.ranks) == 0:
        way = place(job.resized(rows), dims, gpus, sharding)
        if way.fits and way.whole == ways[1].whole:
            ways[rows] = way
        rows *= 2
    kept = max((rows for rows, way in ways.items() if not way.checkpointing), default=1)
    enough = kept if ways[1].whole and kept >= ENOUGH_OF_WHOLE else ENOUGH_ROWS
    return max(kept, *(rows for rows in ways if rows <= enough))

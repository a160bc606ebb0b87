"""Where a model's weights lie: whole on each rank wherever they fit, else sharded; and how many rows train at once.

Planning, estimating and running a stage follow the same rule. Placements change results by rounding at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import Sharding, SweepConfig
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.kinds.memory import Gpus, Need, Sizes
from hfprune_dist.kinds.training import training_need

# More rows at a time than this are hardly faster, so activations are not checkpointed for their sake.
ENOUGH_ROWS, MOST_ROWS = 4, 64
AUTO = "auto"


@dataclass(frozen=True)
class Placement:
    """How a stage uses memory.

    Attributes:
        whole: whether each rank has all weights; otherwise they are sharded with ZeRO-3.
        checkpointing: whether a training's layers keep only their inputs, and run again in backward.
        fits: whether each GPU has the bytes that are needed.
        needed: these bytes.
    """

    whole: bool
    checkpointing: bool
    fits: bool
    needed: float = 0.0


def place(need: Need, gpus: Gpus, sharding: Sharding) -> Placement:
    """The fastest placement that fits; if none does, the one that takes the least memory.

    Args:
        gpus: of all ranks.
        sharding: ``runtime.sharding``.
    """
    both = [True] if gpus.ranks == 1 or need.gathered is None else [True, False]
    wholes = {"replicate": [True], "zero3": [False]}.get(sharding, both)
    ways = []
    for whole in wholes:
        for again in (False,) if need.again is None else (False, True):
            needed = need.on_each_gpu(gpus.ranks, whole=whole, checkpointing=again)
            ways.append(Placement(whole, again, needed <= gpus.memory, needed))
    return next((way for way in ways if way.fits), min(ways, key=lambda way: way.needed))


def chooses(config: SweepConfig) -> bool:
    """Whether the size of a LoRA training's micro-batch is still to be chosen."""
    return any(settings.micro_batch_size == AUTO for settings in _trainings(config).values())


def choose_micro_batches(
    config: SweepConfig, models: Sequence[Checkpoint], gpus: Mapping[str, Gpus], methods: Iterable[Method] = ()
) -> SweepConfig:
    """The configuration with a number for every micro-batch size of LoRA training.

    Args:
        models: every dense model of the sweep; the one that leaves room for the fewest rows decides.
        gpus: section -> what its stages run on; a section is absent without GPUs, or if their memory is unknown.
        methods: the sweep's methods; all recoveries have the same rows, those that mask units (LoRAPrune) included.
    """
    masks = any(it.prunes_in == "recovery" for it in methods)
    rows: dict[str, int | Literal["auto"]] = {}
    for section, settings in _trainings(config).items():
        distills = section == "distillation"
        tokens = (config.calibration if distills else config.recovery).sequence_length
        need = partial(training_need, settings, tokens=tokens, distills=distills, masks=masks and not distills)
        rows[section] = 1
        if section in gpus:
            where, sharding = gpus[section], config.runtime.sharding
            needs = [partial(need, Sizes.of(model)) for model in models]
            rows[section] = min(_most_rows(it, settings.batch_size, where, sharding) for it in needs)
    return with_micro_batches(config, rows)


def _trainings(config: SweepConfig) -> dict[str, LoraTraining]:
    return {"recovery": config.recovery, "distillation": config.distillation}


def with_micro_batches(config: SweepConfig, rows: Mapping[str, int | Literal["auto"]]) -> SweepConfig:
    """The configuration with these micro-batch sizes, by section, where they are still to be chosen."""
    return config.model_copy(
        update={
            name: settings.model_copy(update={"micro_batch_size": rows[name]})
            for name, settings in _trainings(config).items()
            if settings.micro_batch_size == AUTO and name in rows
        }
    )


def _most_rows(need: Callable[[int], Need], batch_size: int, gpus: Gpus, sharding: Sharding) -> int:
    """The largest power of two that fits, that divides a step evenly among ranks, and for whose sake nothing is
    sharded; no more than enough rows if layers would run again.
    """
    ways = {1: place(need(1), gpus, sharding)}
    rows = 2
    while rows <= MOST_ROWS and batch_size % (rows * gpus.ranks) == 0:
        way = place(need(rows), gpus, sharding)
        if way.fits and way.whole == ways[1].whole:
            ways[rows] = way
        rows *= 2
    return max(rows for rows, way in ways.items() if rows <= ENOUGH_ROWS or not way.checkpointing)

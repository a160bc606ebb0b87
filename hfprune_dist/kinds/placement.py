"""Where a model's weights lie: whole on each rank wherever they fit, else sharded; and how many rows train at once.

Planning, estimating and running a stage follow the same rule. Placements change results by rounding at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import Sharding, SweepConfig
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.kinds.dimensions import Dimensions
from hfprune_dist.kinds.memory import Gpus, Job, fits
from hfprune_dist.kinds.training import Train

# More rows at a time than this are hardly faster, so activations are not checkpointed for their sake. With whole
# weights, which need no gathering, fewer rows already keep a GPU busy for longer than its host needs to launch them.
ENOUGH_ROWS, ENOUGH_OF_WHOLE = 4, 2
MOST_ROWS = 64
AUTO = "auto"


@dataclass(frozen=True)
class Placement:
    """How a job uses memory.

    Attributes:
        whole: whether each rank has all weights; otherwise they are sharded with ZeRO-3.
        checkpointing: whether layers keep only their inputs, and run again in backward.
        fits: whether this is expected to fit.
    """

    whole: bool
    checkpointing: bool
    fits: bool

    def of(self, job: Job, gpus: Gpus) -> tuple[Job, Gpus]:
        """The job as it will run, and the GPUs that hold one copy of the weights."""
        copy = replace(gpus, nodes=1, per_node=1) if self.whole else gpus
        return replace(job, checkpointing=self.checkpointing), copy


def place(job: Job, dims: Dimensions, gpus: Gpus, sharding: Sharding) -> Placement:
    """The fastest placement that fits; if none does, the one that takes the least memory. A training may checkpoint its
    activations; whether others do is a setting.

    Args:
        gpus: of all ranks.
        sharding: ``runtime.sharding``.
    """
    both = [True] if gpus.ranks == 1 else [True, False]  # a single rank gains nothing from sharding
    wholes = {"replicate": [True], "zero3": [False]}.get(sharding, both)
    checkpointing = (False, True) if isinstance(job, Train) else (job.checkpointing,)
    ways = [Placement(whole, again, True) for whole in wholes for again in checkpointing]
    placed = [(way, *way.of(job, gpus)) for way in ways]
    for way, as_placed, copy in placed:
        if fits(as_placed, dims, copy):
            return way
    least = min(placed, key=lambda it: it[1].memory(dims, it[2].ranks).total)
    return replace(least[0], fits=False)


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
        recovers = section == "recovery"
        job = Train.of(one, tokens[section], distills=not recovers, masks=masking and recovers)
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
    """The largest power of two that fits, that divides a step evenly among ranks, and for whose sake nothing is
    sharded; no more than enough rows if layers would run again.
    """
    ways = {1: place(job, dims, gpus, sharding)}
    rows = 2
    while rows <= MOST_ROWS and batch_size % (rows * gpus.ranks) == 0:
        way = place(replace(job, batch=rows), dims, gpus, sharding)
        if way.fits and way.whole == ways[1].whole:
            ways[rows] = way
        rows *= 2
    kept = max((rows for rows, way in ways.items() if not way.checkpointing), default=1)
    enough = kept if ways[1].whole and kept >= ENOUGH_OF_WHOLE else ENOUGH_ROWS
    return max(kept, *(rows for rows in ways if rows <= enough))

"""Memory that a plan's stages need on a profile's GPUs: estimates for dry runs, and refusal of plans that can't fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hfprune_launch.slurm.profile import Profile, Resources
from hfprune_launch.slurm.stage_jobs import gpus_of, job_of, runs_a_model
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfprune_dist.config.parameters import (
    DistillParameters,
    ImportanceParameters,
    LoraPruneParameters,
    Parameters,
    PruneParameters,
    RecoverParameters,
)
from hfprune_dist.config.schema import RuntimeConfig, Sharding
from hfprune_dist.errors import UserError
from hfprune_dist.planning.dimensions import Dimensions, checkpoint_dimensions
from hfprune_dist.planning.memory import GIB, Calibration, Evaluate, Generate, Gpus, Job, LayerPass, Memory, Train, fits
from hfprune_dist.planning.placement import ENOUGH_ROWS, place
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage

NOTHING_HELPS = "no number of nodes is enough: GPUs with more memory, or shorter sequences"
NO_REFIT_FITS = "every rank has a layer's Gram matrices: GPUs with more memory, or a method with another refit, or none"
MOST_NODES, MICRO_BATCHES = 256, (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Estimate:
    """The computed needs of one stage.

    Attributes:
        host_memory: bytes of main memory on one node that hidden states of all its ranks take.
        host_available: bytes of main memory of one node; None if the profile does not say.
        fits: whether the GPUs' memory is enough; None if the profile does not say how much memory a GPU has.
        advice: nodes and micro-batch that would suit the stage better; empty if none are known.
    """

    stage: Stage
    memory: Memory
    available: float | None
    host_memory: float
    host_available: float | None
    fits: bool | None
    advice: str

    @property
    def lacks_host_memory(self) -> bool:
        """Whether nodes have less main memory than is needed."""
        return self.host_available is not None and self.host_memory > self.host_available


def estimate_stages(plan: Plan, todo: Sequence[str], profile: Profile, runtime: RuntimeConfig) -> list[Estimate]:
    """Return estimates for those of the stages in ``todo`` that run a model on GPUs.

    A pruned model counts as if it were dense, except in its own refit.
    """
    return [
        _estimate(plan, stage, profile.resources[stage.kind], runtime)
        for stage in (plan.stages[stage_id] for stage_id in todo)
        if profile.resources[stage.kind].gpus and runs_a_model(stage.params)
    ]


def _refits(params: Parameters) -> bool:
    return isinstance(params, PruneParameters) and params.refit != "none"


def refuse_what_cannot_fit(estimates: Sequence[Estimate]) -> None:
    """Raise UserError naming every stage that needs more memory than its GPUs or nodes have, and what would help."""
    problems = [problem for each in estimates for problem in _problems(each)]
    if problems:
        raise UserError(
            "the plan can't fit the profile's GPUs and nodes (estimates):\n" + "\n".join(f"  {it}" for it in problems)
        )


def _problems(estimate: Estimate) -> Iterator[str]:
    stage = f"{estimate.stage.kind} {estimate.stage.label}"
    if estimate.fits is False:
        yield (
            f"{stage}: about {estimate.memory.needed / GIB:,.1f} GiB on each GPU, which has "
            f"{(estimate.available or 0) / GIB:,.1f} GiB (gpu_memory_gib); "
            f"{estimate.advice or (NO_REFIT_FITS if _refits(estimate.stage.params) else NOTHING_HELPS)}"
        )
    if estimate.lacks_host_memory:
        yield (
            f"{stage}: about {estimate.host_memory / GIB:,.1f} GiB of hidden states on each node, which has "
            f"{(estimate.host_available or 0) / GIB:,.1f} GiB (memory); more nodes, or fewer calibration windows"
        )


def show_estimates(console: Console, estimates: Sequence[Estimate]) -> None:
    """Print the estimates as a table that says that nothing in it was measured."""
    if not estimates:
        return
    lines = Table("stage", "for", "memory per GPU", "host memory", "fits", "suggested", box=None, pad_edge=False)
    for each in estimates:
        verdict = {None: "? (gpu_memory_gib)", True: "yes", False: "no"}[each.fits]
        if each.lacks_host_memory:
            verdict = "no (memory)"
        memory = f"~{each.memory.needed / GIB:,.1f} GiB"
        host = f"~{each.host_memory / GIB:,.1f} GiB" if each.host_memory else ""
        lines.add_row(each.stage.kind, escape(each.stage.label), memory, host, verdict, escape(each.advice))
    console.print("\nestimates from the models' shapes and the profile's GPUs; nothing here was measured:")
    console.print(lines)


def _estimate(plan: Plan, stage: Stage, resources: Resources, runtime: RuntimeConfig) -> Estimate:
    dims, gpus = checkpoint_dimensions(plan.dense_checkpoint(stage)), gpus_of(resources)
    job = job_of(plan, stage, runtime)
    placed, copy = _placed(job, dims, gpus, runtime.sharding)
    known = resources.gpu_memory_gib is not None
    return Estimate(
        stage=stage,
        memory=placed.memory(dims, copy.ranks),
        available=gpus.memory if known else None,
        host_memory=resources.tasks_per_node * job.host_bytes(dims, gpus.ranks),
        host_available=resources.memory_bytes,
        fits=fits(placed, dims, copy) if known else None,
        advice=_advice(job, dims, gpus, runtime.sharding, _shared_rows(stage)) if known else "",
    )


def _placed(job: Job, dims: Dimensions, gpus: Gpus, sharding: Sharding) -> tuple[Job, Gpus]:
    """Return a job as it will run, and the GPUs that hold one copy of what it needs."""
    if isinstance(job, LayerPass | Generate):
        return job, gpus
    return place(job, dims, gpus, sharding).of(job, gpus)


def _advice(job: Job, dims: Dimensions, gpus: Gpus, sharding: Sharding, rows: _SharedRows) -> str:
    """Return what makes a job fit that doesn't: a smaller micro-batch, sharded weights, or the nearest number of nodes
    that holds one row; for calibration that fits, a larger micro-batch, up to ``ENOUGH_ROWS``.
    """

    def holds(size: int, where: Gpus, how: Sharding) -> bool:
        placed, copy = _placed(replace(job, batch=size), dims, where, how)
        return fits(placed, dims, copy)

    fitting = [size for size in rows.sizes(gpus.ranks) if holds(size, gpus, sharding)]
    if holds(job.batch, gpus, sharding):
        larger = [size for size in fitting if job.batch < size <= ENOUGH_ROWS]
        return f"{_setting_of(job)} {larger[-1]}" if larger and isinstance(job, Calibration) else ""
    if isinstance(job, Generate):
        return "fewer efficiency.batch_sizes or tokens, or efficiency.enabled false"
    if fitting:
        return f"{_setting_of(job)} {fitting[-1]}"
    if isinstance(job, LayerPass):
        return ""
    if sharding == "replicate":
        return "runtime.sharding zero3"
    # A single rank gathers nothing, so fewer nodes may hold a job that more nodes can't.
    counts = (*range(gpus.nodes + 1, MOST_NODES + 1), *range(1, gpus.nodes))
    candidates = (replace(gpus, nodes=count) for count in counts)
    holding = [it for it in candidates if rows.allow(it.ranks) and holds(1, it, sharding)]
    return f"nodes {holding[0].nodes}, {_setting_of(job)} 1" if holding else ""


def _setting_of(job: Job) -> str:
    """Return the setting for the size of a job's micro-batches."""
    match job:
        case Train(distills=distills):
            return f"{'distillation' if distills else 'recovery'}.micro_batch_size"
        case Evaluate():
            return "evaluation.batch_size"
    return "calibration.micro_batch_size"


@dataclass(frozen=True)
class _SharedRows:
    """The rows that the micro-batches of all ranks have together.

    Attributes:
        most: the most they can have; None if nothing limits them.
        evenly: whether they must divide that number.
    """

    most: int | None = None
    evenly: bool = False

    def allow(self, rows: int) -> bool:
        if self.most is None:
            return True
        return self.most % rows == 0 if self.evenly else rows <= self.most

    def sizes(self, ranks: int) -> Sequence[int]:
        """Return the sizes that a micro-batch can have on this many ranks; the smallest if none suits them."""
        return [size for size in MICRO_BATCHES if self.allow(size * ranks)] or MICRO_BATCHES[:1]


def _shared_rows(stage: Stage) -> _SharedRows:
    """Return the rows that ranks share: in training, those of an optimizer step, in recovery evenly.

    In calibration, a shard belongs to one rank, so its ``shard_size`` micro-batches run one at a time.
    """
    match stage.params:
        case ImportanceParameters(calibration=calibration):
            return _SharedRows(max(1, calibration.samples // calibration.shard_size))
        case RecoverParameters(recovery=recovery) | LoraPruneParameters(recovery=recovery):
            return _SharedRows(recovery.batch_size, evenly=True)
        case DistillParameters(distillation=settings):
            return _SharedRows(settings.batch_size)
    return _SharedRows()

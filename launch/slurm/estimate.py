"""Memory that a plan's stages need on a profile's GPUs: estimates for dry runs, and refusal of plans that can't fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hfprune_launch.slurm.profile import Profile, Resources
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfprune_dist.config.schema import RuntimeConfig, Sharding
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.dimensions import Dimensions, checkpoint_dimensions
from hfprune_dist.kinds.memory import GIB, Gpus, Job, Memory, Planned, StageParameters, fits, parameters_of
from hfprune_dist.kinds.placement import place
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage

MOST_NODES, MICRO_BATCHES = 256, (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Estimate:
    """The computed needs of one stage.

    Attributes:
        host_memory: bytes of main memory on one node that hidden states of all its ranks take.
        host_available: bytes of main memory of one node; None if the profile does not say.
        fits: whether the GPUs' memory is enough; None if the profile does not say how much memory a GPU has.
        advice: micro-batch, nodes or sharding with which the stage would fit; empty if it does, or none are known.
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


def gpus_of(resources: Resources) -> Gpus:
    """Return the GPUs of a kind of stage, one for each rank; of unknown memory if the profile doesn't say."""
    return Gpus(resources.nodes, resources.tasks_per_node, (resources.gpu_memory_gib or 0.0) * GIB)


def gpus_of_profile(resources: Resources) -> Gpus | None:
    """Return the GPUs of a kind of stage; None if it has none or the profile doesn't say how much memory they have."""
    return gpus_of(resources) if resources.gpus and resources.gpu_memory_gib else None


def estimate_stages(plan: Plan, todo: Sequence[str], profile: Profile, runtime: RuntimeConfig) -> list[Estimate]:
    """Return estimates for those of the stages in ``todo`` that run a model on GPUs.

    A pruned model counts as if it were dense, except in its own refit.
    """
    found = []
    for stage in (plan.stages[stage_id] for stage_id in todo):
        resources, dense = profile.resources[stage.kind], plan.dense_checkpoint(stage)
        planned = Planned(stage, plan.stages, dense, runtime.activation_checkpointing)
        if resources.gpus and (job := parameters_of(stage).job(planned)) is not None:
            found.append(_estimate(stage, job, checkpoint_dimensions(dense), resources, runtime.sharding))
    return found


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
            f"{estimate.advice or parameters_of(estimate.stage).remedy}"
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


def _estimate(stage: Stage, job: Job, dims: Dimensions, resources: Resources, sharding: Sharding) -> Estimate:
    gpus, params = gpus_of(resources), parameters_of(stage)
    placed, copy = _placed(job, dims, gpus, sharding)
    known = resources.gpu_memory_gib is not None
    fitting = fits(placed, dims, copy) if known else None
    return Estimate(
        stage=stage,
        memory=placed.memory(dims, copy.ranks),
        available=gpus.memory if known else None,
        host_memory=resources.tasks_per_node * job.host_bytes(dims, gpus.ranks),
        host_available=resources.memory_bytes,
        fits=fitting,
        advice=_advice(params, job, dims, gpus, sharding) if fitting is False else "",
    )


def _placed(job: Job, dims: Dimensions, gpus: Gpus, sharding: Sharding) -> tuple[Job, Gpus]:
    """Return a job as it will run, and the GPUs that hold one copy of what it needs."""
    return place(job, dims, gpus, sharding).of(job, gpus) if job.is_placed else (job, gpus)


def _advice(params: StageParameters, job: Job, dims: Dimensions, gpus: Gpus, sharding: Sharding) -> str:
    """Return what makes a job fit that doesn't: a smaller micro-batch, sharded weights, or the nearest number of nodes
    that holds one row; empty if none of them does.
    """

    def holds(size: int, where: Gpus) -> bool:
        placed, copy = _placed(replace(job, batch=size), dims, where, sharding)
        return fits(placed, dims, copy)

    fitting = [size for size in MICRO_BATCHES if params.allows(size * gpus.ranks) and holds(size, gpus)]
    if fitting:
        return f"{params.batch_setting} {fitting[-1]}"
    if not job.is_placed:
        return ""
    if sharding == "replicate":
        return "runtime.sharding zero3"
    # A single rank gathers nothing, so fewer nodes may hold a job that more nodes can't.
    counts = (*range(gpus.nodes + 1, MOST_NODES + 1), *range(1, gpus.nodes))
    candidates = (replace(gpus, nodes=count) for count in counts)
    holding = next((it for it in candidates if params.allows(it.ranks) and holds(1, it)), None)
    return "" if holding is None else f"nodes {holding.nodes}, {params.batch_setting} 1"

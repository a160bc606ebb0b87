"""Memory that a plan's stages need on a profile's GPUs: estimates for dry runs, and refusal of plans that can't fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from hfprune_launch.slurm.profile import Profile, Resources
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import RuntimeConfig, Sharding
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import GIB, Gpus, Planned, parameters_of, place
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage

MOST_NODES, MICRO_BATCHES = 256, (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Estimate:
    """The computed needs of one stage.

    Attributes:
        needed: bytes that each GPU should have.
        host_memory: bytes of main memory on one node that hidden states of all its ranks take.
        fits: whether the GPUs' memory is enough; None if the profile does not say how much memory a GPU has.
        advice: micro-batch, nodes or sharding with which the stage would fit; empty if it does, or none are known.
        problems: what GPUs or nodes lack, and what would help.
    """

    stage: Stage
    needed: float
    host_memory: float
    fits: bool | None
    advice: str
    problems: list[str]


def gpus_of(resources: Resources) -> Gpus:
    """Return the GPUs of a kind of stage, one for each rank; of unknown memory if the profile doesn't say."""
    return Gpus(resources.ranks, (resources.gpu_memory_gib or 0.0) * GIB)


def estimate_stages(plan: Plan, todo: Sequence[str], profile: Profile, runtime: RuntimeConfig) -> list[Estimate]:
    """Return estimates for those of the stages in ``todo`` that run a model on GPUs.

    A pruned model counts as if it were dense, except in its own refit.
    """
    found, opened = [], cache(open_checkpoint)
    for stage in (plan.stages[stage_id] for stage_id in todo):
        planned = Planned(stage, plan.stages, opened(plan.dense_folder(stage)), runtime.activation_checkpointing)
        resources = profile.resources[stage.kind]
        if resources.gpus and (estimate := _estimate(planned, resources, runtime.sharding)) is not None:
            found.append(estimate)
    return found


def refuse_what_cannot_fit(estimates: Sequence[Estimate]) -> None:
    """Raise UserError naming every stage that needs more memory than its GPUs or nodes have, and what would help."""
    problems = "".join(f"\n  {problem}" for each in estimates for problem in each.problems)
    if problems:
        raise UserError(f"the plan can't fit the profile's GPUs and nodes (estimates):{problems}")


def show_estimates(console: Console, estimates: Sequence[Estimate]) -> None:
    """Print the estimates as a table that says that nothing in it was measured."""
    if not estimates:
        return
    lines = Table("stage", "for", "memory per GPU", "host memory", "fits", "suggested", box=None, pad_edge=False)
    for each in estimates:
        verdict = "no" if each.problems else "yes" if each.fits else "? (gpu_memory_gib)"
        memory = f"~{each.needed / GIB:,.1f} GiB"
        host = f"~{each.host_memory / GIB:,.1f} GiB" if each.host_memory else ""
        lines.add_row(each.stage.kind, escape(each.stage.label), memory, host, verdict, escape(each.advice))
    console.print("\nestimates from the models' shapes and the profile's GPUs; nothing here was measured:")
    console.print(lines)


def _estimate(planned: Planned, resources: Resources, sharding: Sharding) -> Estimate | None:
    stage, gib = planned.stage, resources.gpu_memory_gib
    need = parameters_of(stage).need(planned)
    if need is None:
        return None
    placed, host, host_available = (
        place(need, gpus_of(resources), sharding),
        need.host / resources.nodes,
        resources.memory_bytes,
    )
    fits = None if gib is None else placed.fits
    advice = _advice(planned, resources, sharding) if fits is False else ""
    problems = []
    if fits is False:
        problems.append(
            f"{stage.kind} {stage.label}: about {placed.needed / GIB:,.1f} GiB on each GPU, which has {gib:,.1f} GiB "
            f"(gpu_memory_gib); {advice or parameters_of(stage).remedy}"
        )
    if host_available is not None and host > host_available:
        problems.append(
            f"{stage.kind} {stage.label}: about {host / GIB:,.1f} GiB of hidden states on each node, which has "
            f"{host_available / GIB:,.1f} GiB (memory); more nodes, or fewer calibration windows"
        )
    return Estimate(stage, placed.needed, host, fits, advice, problems)


def _advice(planned: Planned, resources: Resources, sharding: Sharding) -> str:
    """Return what makes a stage fit that doesn't: a smaller micro-batch, sharded weights, or the nearest number of
    nodes that holds one row; empty if none of them does.
    """
    params, gpus, per_node = parameters_of(planned.stage), gpus_of(resources), resources.tasks_per_node

    def holds(rows: int, ranks: int) -> bool:
        need = params.need(planned, rows)
        return need is not None and place(need, Gpus(ranks, gpus.memory), sharding).fits

    fitting = [rows for rows in MICRO_BATCHES if params.allows(rows * gpus.ranks) and holds(rows, gpus.ranks)]
    if fitting:
        return f"{params.batch_setting} {fitting[-1]}"
    need = params.need(planned)
    if need is None or need.gathered is None:
        return ""
    if sharding == "replicate":
        return "runtime.sharding zero3"
    # A single rank gathers nothing, so fewer nodes may hold a stage that more nodes can't.
    counts = (*range(resources.nodes + 1, MOST_NODES + 1), *range(1, resources.nodes))
    holding = next((nodes for nodes in counts if params.allows(nodes * per_node) and holds(1, nodes * per_node)), None)
    return "" if holding is None else f"nodes {holding}, {params.batch_setting} 1"

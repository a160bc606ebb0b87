"""Memory that a plan's stages need on a profile's GPUs: estimates for dry runs, and refusal of plans that can't fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from hfprune_launch.screen import plain_table
from hfprune_launch.slurm.profile import Profile, Resources
from rich.console import Console
from rich.markup import escape

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import RuntimeConfig, Sharding
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import GIB, Gpus, Need, Planned, StageParameters, place, settings_of
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class Estimate:
    """The computed needs of one stage: bytes that each GPU should have, and bytes of hidden states on a node.

    Attributes:
        fits: None if the profile does not say how much memory a GPU has.
        problems: what GPUs or nodes lack, and what would help.
    """

    stage: Stage
    needed: float
    host_memory: float
    fits: bool | None
    problems: list[str]


def estimate_stages(plan: Plan, todo: Sequence[str], profile: Profile, runtime: RuntimeConfig) -> list[Estimate]:
    """Return estimates for stages that run a model on GPUs; a pruned one counts as dense, except in its own refit."""
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
    lines = plain_table("stage", "for", "memory per GPU", "host memory", "fits")
    for each in estimates:
        verdict = "no" if each.problems else "yes" if each.fits else "? (gpu_memory_gib)"
        host = f"~{each.host_memory / GIB:,.1f} GiB" if each.host_memory else ""
        lines.add_row(each.stage.kind, escape(each.stage.label), f"~{each.needed / GIB:,.1f} GiB", host, verdict)
    console.print("\nestimates from the models' shapes and the profile's GPUs; nothing here was measured:")
    console.print(lines)


def _estimate(planned: Planned, resources: Resources, sharding: Sharding) -> Estimate | None:
    stage, gib = planned.stage, resources.gpu_memory_gib
    params = settings_of(stage)
    if (need := params.need(planned)) is None:
        return None
    gpus = Gpus(resources.ranks, (gib or 0.0) * GIB)
    placed = place(need, gpus, sharding)
    host, host_available = need.host / resources.nodes, resources.memory_bytes
    problems = []
    if gib is not None and not placed.fits:
        problems.append(
            f"{stage.kind} {stage.label}: about {placed.needed / GIB:,.1f} GiB on each GPU, which has {gib:,.1f} GiB "
            f"(gpu_memory_gib); {_what_helps(params, need, gpus)}GPUs with more memory"
        )
    if host_available is not None and host > host_available:
        problems.append(
            f"{stage.kind} {stage.label}: about {host / GIB:,.1f} GiB of hidden states on each node, which has "
            f"{host_available / GIB:,.1f} GiB (memory); more nodes, or fewer calibration windows"
        )
    return Estimate(stage, placed.needed, host, None if gib is None else placed.fits, problems)


def _what_helps(params: StageParameters, need: Need, gpus: Gpus) -> str:
    section, name = params.batch_setting.split(".")
    batch = getattr(getattr(params, section, params), name)
    told = "" if batch in (1, [1], "auto") else f"lower {params.batch_setting}, "
    told += "choose methods with a smaller refit, " if isinstance(params, PruneParameters) else ""
    if need.gathered is not None:
        more = "" if place(need, gpus, "zero3").fits else "take more nodes with "
        told += f"{more}runtime.sharding zero3, "
    return f"{told}or take " if told else "take "

"""Time that a plan's stages take on a profile's GPUs, for a dry run: a table of hours, and the assumptions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.stage_jobs import gpus_of, job_of, placed_job, runs_a_model
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.dimensions import checkpoint_dimensions
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.footprint import Job
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.rates import ASSUMED
from hfprune_dist.planning.stage_times import StageTime, StageTimes
from hfprune_dist.planning.training_footprint import Train
from hfprune_dist.results.formats import counted
from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class StageHours:
    """A stage and the time that it is expected to take."""

    stage: Stage
    time: StageTime


@dataclass(frozen=True)
class Total:
    """Total time of stages run one at a time, and the number of stages counted; those of unknown time are left out."""

    hours: float
    gpu_hours: float
    known: int

    @classmethod
    def of(cls, every: Iterable[StageHours]) -> Total:
        known = [it.time for it in every if it.time.seconds is not None]
        return cls(sum(it.hours or 0.0 for it in known), sum(it.gpu_hours or 0.0 for it in known), len(known))


def plan_hours(plan: Plan, todo: Sequence[str], profile: Profile, runtime: RuntimeConfig) -> list[StageHours]:
    """Return the hours of the stages in ``todo``, each on the nodes that the profile has for its kind."""
    times = StageTimes(plan, checkpointing=runtime.activation_checkpointing)
    stages = [plan.stages[stage_id] for stage_id in todo]
    return [StageHours(stage, _time(times, plan, stage, profile, runtime)) for stage in stages]


def _time(times: StageTimes, plan: Plan, stage: Stage, profile: Profile, runtime: RuntimeConfig) -> StageTime:
    resources = profile.resources[stage.kind]
    gpus = gpus_of(resources) if resources.gpus else None
    job, placed = None, gpus
    if gpus is not None and runs_a_model(stage.params):
        dims = checkpoint_dimensions(plan.dense_checkpoint(stage))
        job, placed = placed_job(job_of(plan, stage, runtime), dims, gpus, runtime)
        if gpus.flops is not None and not gpus.memory and _depends_on_memory(job, gpus, runtime):
            return StageTime(None, resources.gpus, "all of it: the profile has no gpu_memory_gib")
    return replace(times.of(stage, job, gpus, placed), gpus=resources.gpus)  # some GPUs may have no rank


def _depends_on_memory(job: Job, gpus: Gpus, runtime: RuntimeConfig) -> bool:
    """Return whether the GPUs' memory decides if weights are whole, or if layers run again in training."""
    return isinstance(job, Train) or (isinstance(job, Evaluate) and runtime.sharding == "auto" and gpus.ranks > 1)


def show_hours(console: Console, hours: Sequence[StageHours]) -> None:
    """Print the hours as a table with its total; print nothing if no stage has GPUs."""
    if not any(it.time.gpus for it in hours):
        return
    lines = Table(box=None, pad_edge=False)
    for name in ("stage", "for", "GPUs", "GPU-hours", "hours", "not counted"):
        lines.add_column(name, justify="right" if name in ("GPUs", "GPU-hours", "hours") else "left")
    for each in hours:
        time = each.time
        hours_of_it = shown(time.gpu_hours), shown(time.hours)
        lines.add_row(each.stage.kind, escape(each.stage.label), str(time.gpus), *hours_of_it, escape(time.missing))
    total = Total.of(hours)
    unknown = len(hours) - total.known
    name = "at least" if any(it.time.missing for it in hours) else "all"
    left_out = f"all of {counted(unknown, 'stage')}" if unknown else ""
    lines.add_row(name, "", "", shown(total.gpu_hours), shown(total.hours), left_out)
    console.print("\nhours on the profile's nodes, one stage after the other; computed, nothing here was measured:")
    console.print(lines)
    console.print(ASSUMED, soft_wrap=True)


def shown(hours: float | None) -> str:
    """Format hours: two decimals below 10, otherwise none; "?" if unknown."""
    return "?" if hours is None else f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"

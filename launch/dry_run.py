"""What a sweep would do: a line for each stage and checkpoint, remarks on settings, batch scripts, hours, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from hfprune_launch.prepare import Prepared, require_runnable
from hfprune_launch.screen import plain_table
from hfprune_launch.slurm.cli import show_jobs
from hfprune_launch.slurm.estimate import show_estimates
from hfprune_launch.sweep_folder import NO_RUN, measured_hours
from rich.console import Console
from rich.markup import escape

from hfprune_dist.planning.ratios import place_of
from hfprune_dist.planning.remarks import planned_sizes, remarks_on_method, sizes_of
from hfprune_dist.results.formats import counted
from hfprune_dist.store.stage import kind_of

# Lengths of three trainings that tell where a long one leads, as multiples of the shortest, which has a five-hundredth
# of its tokens, or a few steps if that is more. Whole steps may make the shortest a quarter longer.
TRIALS, SHARE, STEPS = (1, 3, 10), 0.002, 4
SIZES = ("experts", "width", "KV heads", "layers", "ratio")


def show_dry_run(prepared: Prepared) -> None:
    """Show the plan, its checkpoints, and every job that would be submitted; raise UserError if they can't run."""
    request, sweep = prepared.request, prepared.sweep
    _show_stages(request.console, prepared)
    _show_shapes(request.console, prepared)
    for remark in _remarks(prepared):
        request.tell(f"note: {remark}")
    if request.profile is not None:
        show_jobs(request.console, sweep, request.profile, prepared.config.runtime, prepared.todo)
        show_estimates(request.console, prepared.estimates)
    _show_hours(prepared)
    require_runnable(prepared, looks_only=True)


def _show_stages(console: Console, prepared: Prepared) -> None:
    """Show one line per stage: reuse, run or not needed, and the reason."""
    plan, counts = prepared.sweep.plan, Counter[str]()
    lines = plain_table("stage", "for", "id", "action", "reason")
    for stage in plan.stages.values():
        verdict = prepared.verdicts[stage.id]
        action = "run" if stage.id in prepared.todo else "reuse" if verdict.state == "done" else "not needed"
        counts[action] += 1
        lines.add_row(stage.kind, escape(stage.label), stage.fingerprint, action, escape(verdict.reason))
    console.print(lines)
    unneeded = f", {counts['not needed']} not needed" if counts["not needed"] else ""
    size = f"{counted(len(plan.cells), 'cell')}, {counted(len(plan.stages), 'stage')}"
    console.print(f"{size}: {counts['reuse']} reuse, {counts['run']} run{unneeded}")


def _show_shapes(console: Console, prepared: Prepared) -> None:
    """Show the sizes of each cell's checkpoint; "-" stands for sizes that only a stage can determine."""
    models, shapes = {model.name: model for model in prepared.models}, dict[str, dict[str, str]]()
    for cell in prepared.sweep.plan.cells:
        model = models[cell.model]
        if not model.has_known_shape:
            shapes[cell.label] = {"note": "unknown until the model is downloaded"}
        elif cell.ratio is None or cell.method is None:
            shapes[cell.label] = sizes_of(model.checkpoint)
        elif cell.rounds:
            shapes[cell.label] = {"note": f"{cell.ratio:g} of the dense model, from what {cell.rounds[-1]:g} leaves"}
        else:
            method, where = prepared.methods[cell.method], place_of(cell.model, cell.method)
            shapes[cell.label] = planned_sizes(model.checkpoint, cell.ratio, method, where)
    names = SIZES if any("experts" in sizes for sizes in shapes.values()) else SIZES[1:]
    lines = plain_table("checkpoint of", *names, "", numbers=names)
    for label, sizes in shapes.items():
        lines.add_row(escape(label), *(sizes.get(name, "-") for name in names), sizes.get("note", ""))
    console.print(lines)


def _remarks(prepared: Prepared) -> Iterator[str]:
    """Yield sentences on the effect of settings: how texts are mixed, how many instructions are answered, and what each
    method does to each model.
    """
    shares = prepared.config.calibration.shares()
    if len(shares) > 1:
        texts = (f"{share.windows} of {share.text.path or share.text.dataset}" for share in shares)
        yield f"calibration windows: {', '.join(texts)}"
    for stage in (prepared.sweep.plan.stages[stage_id] for stage_id in prepared.todo if kind_of(stage_id) == "answers"):
        samples = stage.params.to_json()["recovery"]["samples"]
        yield f"{stage.label}, the dense model, answers {f'up to {samples}' if samples else 'all'} instructions"
    for model in (model for model in prepared.models if model.has_known_shape):
        for name, method in prepared.methods.items():
            yield from remarks_on_method(model.checkpoint, method, place_of(model.name, name))


def _show_hours(prepared: Prepared) -> None:
    """Show how long the missing stages may take, as far as stages like them have been run."""
    plan, hours_of = prepared.sweep.plan, measured_hours(prepared.sweep.plan, prepared.sweep.store)
    stages = Counter((stage.kind, hours_of(stage)) for stage in (plan.stages[stage_id] for stage_id in prepared.todo))
    told = [f"{kind} {n} x {NO_RUN if hours is None else f'{hours:.2g} h'}" for (kind, hours), n in stages.items()]
    if told:
        prepared.request.tell(f"\nby finished stages of the same kind and model: {', '.join(told)}")

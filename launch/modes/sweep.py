"""What launch/sweep.py does: configuration -> plan -> stages -> artifacts -> tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_launch.local.backend import LocalBackend
from hfprune_launch.local.hardware import fitting_runtime, note_on_bfloat16
from hfprune_launch.preflight import check_stages
from hfprune_launch.screen import StageScreen, make_console, show_plan, show_results, stage_screen
from hfprune_launch.slurm.batch_script import refuse_unusable_path
from hfprune_launch.slurm.cli import Sweep, cancel, run_on_slurm, show_jobs, show_status
from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.estimate import estimate_stages, refuse_what_cannot_fit, show_estimates
from hfprune_launch.slurm.profile import Profile, load_profile
from hfprune_launch.slurm.status_table import cell_logs
from hfprune_launch.stage.stage_file import Provenance, discard_finished_work
from hfprune_launch.sweep_folder import (
    Record,
    configuration,
    forget_rows,
    read_record,
    require_apart,
    require_folder,
    require_sweep,
    write_config,
    write_record,
)
from rich.console import Console

from hfprune_dist.config.load import parse_assignment, parse_list, parse_ratios
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.planning.earlier_rows import kept_rows, measured_otherwise, with_earlier_rows
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import ModelSource, resolve_models
from hfprune_dist.planning.plan import Cell, Plan, build_plan
from hfprune_dist.results.table import DenseModel, write_reports
from hfprune_dist.store.artifacts import Store, Verdict, require_writable
from hfprune_dist.store.heartbeat import read_failure
from hfprune_dist.store.provenance import code_version

PROJECT = Path(__file__).resolve().parents[2]
PROFILES = PROJECT / "slurm" / "profiles"


def run_sweep(arguments: argparse.Namespace) -> int:
    """Do what the parsed command line says; returns the exit code.

    Raises:
        UserError: for bad input; nothing has been written.
    """
    try:
        return _run_command(make_console(), arguments)
    except SlurmUnavailableError as error:
        print(f"error: Slurm does not answer: {error}; run the same command again to go on", file=sys.stderr)
        return 1


def _run_command(console: Console, arguments: argparse.Namespace) -> int:
    out = arguments.out or Path("runs") / (arguments.config[0].stem if arguments.config else "default")
    if arguments.forget:
        _forget(console, out, arguments.forget)
        return 0
    looks_on = arguments.status or arguments.cancel or arguments.logs is not None
    if looks_on and not arguments.config:
        require_sweep(out)
    config, remark = configuration(out, arguments.config, _overrides(arguments))
    _tell(console, remark)
    store = Store(out / "store")
    if looks_on:
        _show(console, Sweep(_plan_to_show(config, store, out), store, out), arguments)
        return 0
    return _run(console, config, store, out, arguments)


def _run(console: Console, config: SweepConfig, store: Store, out: Path, arguments: argparse.Namespace) -> int:
    """config -> plan -> stages -> artifacts -> report."""
    require_folder(out)
    models, plan = _plan(config, store, download=not arguments.dry_run)
    require_apart(out, plan)
    for model in models:
        for remark in model.checkpoint.remarks:
            _tell(console, f"note: model {model.name!r}: {remark}")
    sweep = Sweep(plan, store, out)
    profile = _profile(arguments)
    if profile is not None:
        refuse_unusable_path(out)
    verdicts = {stage_id: store.verify(stage_id) for stage_id in plan.stages}
    todo = plan.lacking(lambda stage_id: verdicts[stage_id].state == "done")
    runtime, remark = config.runtime, ""
    if profile is None and not _asks_for_ranks(_overrides(arguments)):
        runtime, remark = fitting_runtime(config.runtime)
    _tell(console, remark)
    here = config.model_copy(update={"runtime": runtime})
    estimates = estimate_stages(plan, todo, profile, config.runtime) if profile is not None else []
    if arguments.dry_run:
        show_plan(console, plan, verdicts, todo)
        if profile is not None:
            show_jobs(console, sweep, profile, config.runtime, verdicts)
            show_estimates(console, estimates)
    refuse_what_cannot_fit(estimates)
    check_stages(here, plan, todo, profile)
    if arguments.dry_run:
        return 0
    run = _runner(console, sweep, todo, profile, here, arguments) if todo else None
    require_writable(out)
    write_config(out, config, models)
    write_record(out, _with_earlier(console, out, plan, models))
    store.hashes.save()  # of files that every stage which reads them compares with the plan
    _set_aside_corrupt(console, store, {stage_id: verdicts[stage_id] for stage_id in todo})
    _discard_finished_work(plan, store, verdicts)
    if run is not None and (code := run()) is not None:
        return code
    store.hashes.save()
    _report(console, sweep, models)
    return _exit_code(plan, store)


def _report(console: Console, sweep: Sweep, models: Sequence[ModelSource]) -> None:
    """The tables of all rows of the folder, those that another run has begun meanwhile included."""
    out, folder = sweep.out, _with_earlier(console, sweep.out, sweep.plan, models)
    rows = folder.rows(sweep.store)
    write_reports(rows, out)
    show_results(console, rows)
    if kept := kept_rows(sweep.plan, folder.plan):
        _tell(console, f"rows of earlier runs: {_labels(kept)}; to remove one: --forget '{kept[0].label}'")
    if others := measured_otherwise(sweep.plan, folder.plan):
        _tell(console, f"not to be compared with the other rows, since measured in another way: {_labels(others)}")
    _tell(console, f"written: {out / 'results.csv'}, results.md, results.json")


def _labels(cells: Sequence[Cell]) -> str:
    return ", ".join(cell.label for cell in cells)


def _with_earlier(console: Console, out: Path, plan: Plan, models: Sequence[ModelSource]) -> Record:
    """Today's plan with the rows that the folder has besides."""
    dense = {it.name: DenseModel(it.checkpoint.parameters, it.checkpoint.intermediate_size) for it in models}
    try:
        earlier = read_record(out)
    except UserError as error:
        _tell(console, f"note: rows of earlier runs are lost: {error}")
        return Record(plan, dense)
    return Record(with_earlier_rows(plan, earlier.plan), {**earlier.dense, **dense}) if earlier else Record(plan, dense)


def _forget(console: Console, out: Path, labels: Sequence[str]) -> None:
    show_results(console, forget_rows(out, labels))
    _tell(console, f"removed: {', '.join(labels)}; a run that plans such a row brings it back from {out / 'store'}")


def _tell(console: Console, text: str) -> None:
    """Print a line as it is; nothing where it is empty."""
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _plan(config: SweepConfig, store: Store, download: bool) -> tuple[list[ModelSource], Plan]:
    models = resolve_models(config, PROJECT / "configs" / "models", store.hashes, download)
    methods = resolve_methods(config, PROJECT / "configs" / "methods")
    return models, build_plan(config, models, methods, store.hashes)


def _plan_to_show(config: SweepConfig, store: Store, out: Path) -> Plan:
    """Today's plan with the folder's other rows; where its inputs can't be read any more, what the folder tells."""
    try:
        today = _plan(config, store, download=False)[1]
    except UserError:
        record = read_record(out)
        if record is None:
            raise
        return record.plan
    record = read_record(out)
    return with_earlier_rows(today, record.plan) if record else today


def _runner(
    console: Console,
    sweep: Sweep,
    todo: Sequence[str],
    profile: Profile | None,
    config: SweepConfig,
    arguments: argparse.Namespace,
) -> Callable[[], int | None]:
    """What runs the missing stages, and returns an exit code where it leaves before their end.

    Raises:
        UserError: where this machine can't run them; nothing has been written.
    """
    provenance = Provenance(config.runtime, config.model_dump(), code_version(PROJECT))
    if profile is None:
        backend = LocalBackend(sweep.store, sweep.out / "logs", provenance)
        return lambda: _run_here(console, sweep, todo, backend)
    SlurmCommands().require()
    limit = arguments.max_running or profile.max_running
    return lambda: run_on_slurm(console, sweep, todo, provenance, profile, limit, PROJECT, arguments.follow)


def _run_here(console: Console, sweep: Sweep, todo: Sequence[str], backend: LocalBackend) -> None:
    stages = sweep.plan.stages
    logs = sweep.out / "logs"
    _tell(console, f"{len(todo)} of {len(stages)} stages to run, {backend.ranks} ranks each; logs in {logs}")
    if note := note_on_bfloat16(stages[stage_id] for stage_id in todo):
        _tell(console, f"note: {note}")
    with stage_screen(console, len(todo)) as screen:
        _run_stages(sweep.plan, todo, sweep.store, backend, screen)


def _run_stages(plan: Plan, todo: Sequence[str], store: Store, backend: LocalBackend, screen: StageScreen) -> None:
    """Run missing stages in plan order; a failed one keeps back only those that need its artifact."""
    for stage_id in todo:
        stage = plan.stages[stage_id]
        missing = next((need for need in stage.needs if store.verify(need).state != "done"), None)
        if missing is not None:
            screen.skip(stage, plan.stages[missing])
            continue
        screen.begin(stage)
        screen.end(stage, backend.run(stage, screen.beat))


def _profile(arguments: argparse.Namespace) -> Profile | None:
    """The profile of the cluster to run on; None runs on this machine."""
    if arguments.backend == "slurm" and arguments.profile is None:
        raise UserError("--backend slurm: needs --profile, which says what to ask the cluster for (slurm/profiles)")
    if arguments.max_running is not None and arguments.max_running < 1:
        raise UserError(f"--max-running {arguments.max_running}: must be at least 1")
    if arguments.profile is None or arguments.backend == "local":
        if arguments.max_running is not None:
            raise UserError(f"--max-running {arguments.max_running}: of jobs on Slurm (--profile); here one stage runs")
        if arguments.follow is False:
            raise UserError("--no-follow: of jobs on Slurm (--profile); stages on this machine end with this command")
        return None
    if arguments.ranks is not None:
        raise UserError(f"--ranks {arguments.ranks}: with --profile, its nodes and tasks_per_node say how many")
    return load_profile(arguments.profile, PROFILES)


def _asks_for_ranks(overrides: Mapping[str, Any]) -> bool:
    """Whether the command line says how many ranks there are."""
    section = overrides.get("runtime")
    return "runtime.ranks" in overrides or (isinstance(section, dict) and "ranks" in section)


def _show(console: Console, sweep: Sweep, arguments: argparse.Namespace) -> None:
    """The commands that look at a sweep or stop it, and start nothing."""
    if arguments.logs is not None:
        text = cell_logs(sweep.plan, sweep.store, sweep.out / "logs", arguments.logs, lines=40)
        _tell(console, text)
    elif arguments.cancel:
        cancel(console, sweep)
    else:
        show_status(console, sweep, keep_on=bool(arguments.follow))


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """Command-line flags as dotted keys; a flag of its own wins over --set."""
    overrides = dict(parse_assignment(assignment) for assignment in arguments.set)
    if arguments.models is not None:
        overrides["models"] = parse_list("--models", arguments.models)
    if arguments.ratios is not None:
        overrides["ratios"] = parse_ratios(arguments.ratios)
    if arguments.methods is not None:
        overrides["methods"] = parse_list("--methods", arguments.methods)
    if arguments.criteria is not None:
        overrides["importance.criteria"] = parse_list("--criteria", arguments.criteria)
    if arguments.ranks is not None:
        overrides["runtime.ranks"] = arguments.ranks
    return overrides


def _set_aside_corrupt(console: Console, store: Store, verdicts: Mapping[str, Verdict]) -> None:
    for stage_id, verdict in verdicts.items():
        if verdict.state == "corrupt":
            aside = store.set_aside(stage_id)
            if aside is not None:  # nobody else was faster
                _tell(console, f"corrupt artifact {stage_id} ({verdict.reason}): set aside as {aside}, made again")


def _discard_finished_work(plan: Plan, store: Store, verdicts: Mapping[str, Verdict]) -> None:
    for stage_id, verdict in verdicts.items():
        if verdict.state == "done":
            discard_finished_work(store, plan.stages[stage_id])


def _exit_code(plan: Plan, store: Store) -> int:
    missing = plan.lacking(lambda stage_id: store.manifest(stage_id) is not None)
    failures = [read_failure(store.work(stage_id)) for stage_id in missing]
    if any(failure is not None and failure.cause == "input" for failure in failures):
        return UserError.EXIT_CODE
    return 1 if missing else 0

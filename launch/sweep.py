"""Prune, distill, recover and evaluate models at several ratios, and print the table. Run it again to resume:
only what is missing runs.

examples:
  python launch/sweep.py --models llama,qwen --ratios 0.2,0.5 --config configs/demo.yaml
  python launch/sweep.py --models /data/my-llama --ratios 0.2 --set calibration.path=text.jsonl --out runs/mine
  python launch/sweep.py --config configs/demo.yaml --dry-run
  python launch/sweep.py --config configs/demo.yaml --profile slurm/profiles/mine.yaml     on a Slurm cluster
  python launch/sweep.py --config configs/demo.yaml --profile mine.yaml --status | --cancel

exit codes: 0 every cell has its result; 1 a stage failed; 2 bad input; 130 interrupted
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from hfprune_dist.artifacts import Store, Verdict, require_writable
from hfprune_dist.config import SweepConfig, load_config, parse_assignment, parse_list, parse_ratios
from hfprune_dist.errors import UserError, explained
from hfprune_dist.files import read_json, write_json, write_text
from hfprune_dist.methods import resolve_methods
from hfprune_dist.models.sources import ModelSource, resolve_models
from hfprune_dist.plan import Plan, build_plan
from hfprune_dist.progress import read_failure
from hfprune_dist.provenance import code_version
from hfprune_dist.report import DenseModel, collect_rows, write_reports
from launch.checks import check_stages
from launch.cluster import Sweep, cancel, run_on_slurm, show_jobs, show_status
from launch.estimate import estimate_stages, refuse_what_cannot_fit, show_estimates
from launch.hardware import note_on_bfloat16
from launch.layout import Origin
from launch.local import LocalBackend
from launch.profiles import Profile, load_profile
from launch.screen import StageScreen, make_console, show_plan, show_results, stage_screen
from launch.slurm_cli import SlurmCommands, SlurmUnavailableError
from launch.status import cell_logs

PROJECT = Path(__file__).resolve().parents[1]
PROFILES = PROJECT / "slurm" / "profiles"
SWEEP_FILE = "sweep.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the sweep; problems that the user can fix are one message, never a traceback."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with explained():
            return run_sweep(arguments)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except SlurmUnavailableError as error:
        print(f"error: Slurm does not answer: {error}; run the same command again to go on", file=sys.stderr)
        return 1


def run_sweep(arguments: argparse.Namespace) -> int:
    """config -> plan -> stages -> artifacts -> report."""
    console = make_console()
    config = load_config(arguments.config, _overrides(arguments))
    out = arguments.out or Path("runs") / (arguments.config[0].stem if arguments.config else "default")
    store = Store(out / "store")
    if arguments.status or arguments.cancel or arguments.logs:
        _show(console, Sweep(_plan_to_show(config, store, out), store, out), arguments)
        return 0
    models, plan = _plan(config, store, download=not arguments.dry_run)
    sweep = Sweep(plan, store, out)
    profile = _profile(arguments)
    verdicts = {stage_id: store.verify(stage_id) for stage_id in plan.stages}
    todo = [stage_id for stage_id, verdict in verdicts.items() if verdict.state != "done"]
    estimates = estimate_stages(plan, todo, profile, config.runtime) if profile is not None else []
    if arguments.dry_run:
        show_plan(console, plan, verdicts)
        if profile is not None:
            show_jobs(console, sweep, profile, config.runtime, verdicts)
            show_estimates(console, estimates)
    refuse_what_cannot_fit(estimates)
    check_stages(config, todo, profile)
    if arguments.dry_run:
        return 0
    run = _runner(console, sweep, todo, profile, config, arguments) if todo else None
    require_writable(out)
    _record(out, config, plan, models)
    _set_aside_corrupt(console, store, verdicts)
    if run is not None and (code := run()) is not None:
        return code
    store.hashes.save()
    rows = collect_rows(plan, store, _dense(models))
    write_reports(rows, out)
    show_results(console, rows)
    console.print(f"written: {out / 'results.csv'}, results.md, results.json", highlight=False)
    return _exit_code(plan, store)


def _plan(config: SweepConfig, store: Store, download: bool) -> tuple[list[ModelSource], Plan]:
    models = resolve_models(config, PROJECT / "configs" / "models", store.hashes, download)
    methods = resolve_methods(config, PROJECT / "configs" / "methods")
    return models, build_plan(config, models, methods, store.hashes)


def _plan_to_show(config: SweepConfig, store: Store, out: Path) -> Plan:
    """The plan, or, where its inputs can't be read any more, what the sweep in this folder was last started with."""
    try:
        return _plan(config, store, download=False)[1]
    except UserError:
        record = read_record(out)
        if record is None:
            raise
        return Plan.from_json(record)


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
    origin = Origin(config.runtime, config.model_dump(), code_version(PROJECT))
    if profile is None:
        backend = LocalBackend(sweep.store, sweep.out / "logs", origin)
        return lambda: _run_here(console, sweep, todo, backend)
    SlurmCommands().require()
    limit = arguments.max_running or profile.max_running
    return lambda: run_on_slurm(console, sweep, todo, origin, profile, limit, PROJECT, arguments.follow)


def _run_here(console: Console, sweep: Sweep, todo: Sequence[str], backend: LocalBackend) -> None:
    stages = sweep.plan.stages
    console.print(
        f"{len(todo)} of {len(stages)} stages to run, {backend.ranks} ranks each; logs in {sweep.out / 'logs'}"
    )
    if note := note_on_bfloat16(stages[stage_id] for stage_id in todo):
        console.print(f"note: {note}", highlight=False)
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
        return None
    if arguments.ranks is not None:
        raise UserError(f"--ranks {arguments.ranks}: with --profile, its nodes and tasks_per_node say how many")
    return load_profile(arguments.profile, PROFILES)


def _show(console: Console, sweep: Sweep, arguments: argparse.Namespace) -> None:
    """The commands that look at a sweep or stop it, and start nothing."""
    if arguments.logs:
        text = cell_logs(sweep.plan, sweep.store, sweep.out / "logs", arguments.logs, lines=40)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
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


def _record(out: Path, config: SweepConfig, plan: Plan, models: Sequence[ModelSource]) -> None:
    """Keep the resolved configuration, and the plan in a form from which the report can be made again."""
    import yaml

    write_text(out / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    write_json(
        out / SWEEP_FILE,
        {**plan.to_json(), "dense": {name: vars(facts) for name, facts in _dense(models).items()}},
    )


def read_record(out: Path) -> dict[str, Any] | None:
    """What the sweep in a folder was last started with, as ``_record`` wrote it; None where there was none.

    Raises:
        UserError: where it is damaged.
    """
    try:
        record = read_json(out / SWEEP_FILE)
    except ValueError:
        record = {}
    if record is None or (isinstance(record, dict) and {"stages", "cells", "dense"} <= record.keys()):
        return record
    raise UserError(f"{out / SWEEP_FILE}: damaged; run the sweep again, it makes only what is missing")


def _dense(models: Sequence[ModelSource]) -> dict[str, DenseModel]:
    return {model.name: DenseModel(model.checkpoint.parameters, model.checkpoint.intermediate_size) for model in models}


def _set_aside_corrupt(console: Console, store: Store, verdicts: Mapping[str, Verdict]) -> None:
    for stage_id, verdict in verdicts.items():
        if verdict.state == "corrupt":
            aside = store.set_aside(stage_id)
            console.print(
                f"corrupt artifact {stage_id} ({verdict.reason}): set aside as {aside}, made again", markup=False
            )


def _exit_code(plan: Plan, store: Store) -> int:
    missing = [stage_id for stage_id in plan.stages if store.manifest(stage_id) is None]
    failures = [read_failure(store.work(stage_id)) for stage_id in missing]
    if any(failure is not None and failure.cause == "input" for failure in failures):
        return UserError.EXIT_CODE
    return 1 if missing else 0


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", metavar="A,B", help="aliases (configs/models) or checkpoint folders; default: llama,qwen"
    )
    parser.add_argument(
        "--ratios", metavar="R,R", help="removed / all parameters of the model, each in (0, 1); default: 0.2,0.3"
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="pruning methods (configs/methods) or YAML files; default: surgeon-uniform-block; published: hfprune",
    )
    parser.add_argument(
        "--criteria",
        metavar="A,B",
        help="further scores to compute in the calibration pass, for comparison (importance.criteria)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="YAML configuration; may be repeated, later files win key by key",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="set any key, e.g. --set calibration.samples=64 (value in YAML); wins over files",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="results and store; default: runs/<config name>")
    parser.add_argument(
        "--backend",
        choices=("auto", "local", "slurm"),
        default="auto",
        help="where stages run; auto: on Slurm with --profile, else on this machine",
    )
    parser.add_argument("--ranks", metavar="N", type=int, help="processes per stage; default: one per GPU, or 1")
    parser.add_argument(
        "--profile", metavar="NAME", help="run on Slurm, as slurm/profiles/NAME.yaml or a YAML file says"
    )
    parser.add_argument(
        "--max-running",
        metavar="N",
        type=int,
        help="the most jobs of this sweep that run at once; default: the profile's",
    )
    parser.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="stay until all jobs have ended and show the table (default), or submit and leave; with --status: live",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--status", action="store_true", help="show the state of every stage; starts nothing")
    instead.add_argument("--cancel", action="store_true", help="cancel the sweep's jobs; saved work stays")
    instead.add_argument("--logs", metavar="CELL", help="show the last lines of a cell's logs, e.g. 'llama 0.2 + lora'")
    instead.add_argument(
        "--dry-run", action="store_true", help="print the plan with reasons, and every job; runs nothing"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

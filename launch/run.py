"""Running a sweep: missing stages -> artifacts -> tables, on this machine or on a cluster."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial

from hfprune_launch.local.backend import LocalBackend
from hfprune_launch.local.hardware import note_on_bfloat16
from hfprune_launch.prepare import Prepared
from hfprune_launch.project import PROJECT
from hfprune_launch.screen import StageScreen, show_checkpoints, show_results, stage_screen
from hfprune_launch.slurm.cli import run_on_slurm
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.launcher import NewJobs
from hfprune_launch.stage.stage_file import Provenance
from hfprune_launch.sweep_folder import (
    REPORT,
    Sweep,
    read_sweep,
    record_locked,
    recorded_sweep,
    write_config,
    write_page,
)

from hfprune_dist.errors import LostInputError, UserError
from hfprune_dist.planning.plan import kept_rows, with_earlier_rows
from hfprune_dist.results.formats import counted
from hfprune_dist.results.rows import DenseModel
from hfprune_dist.results.table import RESULTS
from hfprune_dist.store.atomic_files import require_usable
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.stage import Stage


def run_to_tables(prepared: Prepared) -> int:
    """Run missing stages, write the tables, and return the exit code.

    Raises:
        UserError: if stages can't run as asked for; nothing has been written.
    """
    out = prepared.sweep.out
    code = run_missing(prepared)
    if code is None:
        _report(prepared)
    write_page(out, prepared.request.console)
    if code is not None:
        return code
    written = [name for name in (*RESULTS, REPORT) if (out / name).exists()]
    prepared.request.tell(f"written: {out / written[0]}, {', '.join(written[1:])}")
    return _exit_code(prepared.sweep)


def run_missing(prepared: Prepared) -> int | None:
    """Run missing stages, and write report.html whenever one has ended; return an exit code if leaving before the last
    one has.

    Raises:
        UserError: if stages can't run as asked for; nothing has been written.
    """
    sweep, out = prepared.sweep, prepared.sweep.out
    run_stages = _runner(prepared) if prepared.todo else None
    require_usable(out)
    write_config(out, prepared.config, prepared.models)
    with record_locked(out):
        _with_earlier(prepared).write_record()
    sweep.store.hashes.save()  # of input files; every stage that reads one compares its hash with the plan
    _clean_up(prepared)
    if run_stages is None:
        return None
    code = run_stages(partial(write_page, out, prepared.request.console))
    sweep.store.hashes.save()
    return code


def _runner(prepared: Prepared) -> Callable[[Callable[[], None]], int | None]:
    """Return what runs the missing stages: it calls its argument whenever one has ended, and returns an exit code if it
    leaves before the last one has.

    Raises:
        UserError: if this machine can't run them; nothing has been written.
    """
    sweep, here, request = prepared.sweep, prepared.here, prepared.request
    provenance = Provenance(here.runtime, here.model_dump(), PROJECT.code_version())
    if request.profile is None:
        backend = LocalBackend(sweep.store, sweep.out / "logs", provenance, prepared.cancellation)
        return partial(_run_here, prepared, backend)
    SlurmCommands().require()
    profile, follow = request.profile, request.follow
    jobs = partial(NewJobs, provenance, profile, profile.max_running, prepared.cancellation)
    return lambda on_end: run_on_slurm(request.console, sweep, prepared.todo, jobs, follow=follow, on_end=on_end)


def _run_here(prepared: Prepared, backend: LocalBackend, on_end: Callable[[], None]) -> None:
    sweep, todo, tell = prepared.sweep, prepared.todo, prepared.request.tell
    stages, console = sweep.plan.stages, prepared.request.console
    every, ranks = counted(len(stages), "stage"), counted(backend.ranks, "rank")
    tell(f"{len(todo)} of {every} to run, {ranks} each; logs in {sweep.out / 'logs'}")
    if note := note_on_bfloat16(stages[stage_id] for stage_id in todo):
        tell(f"note: {note}")
    with closing(backend), stage_screen(console, len(todo)) as screen:
        for _ in _run_in_order(sweep, todo, backend, screen):
            on_end()


def _run_in_order(sweep: Sweep, todo: Sequence[str], backend: LocalBackend, screen: StageScreen) -> Iterator[Stage]:
    """Run missing stages in plan order and yield those that ran; stages that need a missing artifact are skipped.

    If a stage finds an artifact that it reads damaged, that one is made again, and then the stage has another try.
    """
    stages, store, waiting = sweep.plan.stages, sweep.store, deque(todo)
    tries: Counter[str] = Counter()
    while waiting:
        stage = stages[waiting.popleft()]
        missing = next((need for need in stage.needs if not store.handle(need).is_done()), None)
        if missing is not None:
            screen.skip(stage, stages[missing])
            continue
        screen.begin(stage)
        failure = backend.run(stage, partial(screen.beat, stage))
        screen.end(stage, failure)
        tries[stage.id] += 1
        # Each try finds one of its artifacts at most; more tries than that mean a disk that damages them again.
        has_lost_input = failure is not None and failure.cause == LostInputError.CAUSE
        if has_lost_input and tries[stage.id] <= len(stage.needs):
            again = sweep.plan.lacking(lambda stage_id: store.handle(stage_id).is_done(), [stage.id])
            waiting.extendleft(reversed(again))
            screen.expect(len(again))
        yield stage


def _clean_up(prepared: Prepared) -> None:
    """Set aside corrupt artifacts that are to be made again; discard the leftovers of finished stages, and close their
    attempts, whose ends no launcher has seen.
    """
    ledger = Ledger(prepared.sweep.store)
    for stage_id, verdict in prepared.verdicts.items():
        handle = prepared.sweep.store.handle(stage_id)
        if verdict.state == "done":
            handle.discard_leftovers()
            ledger.close_done(stage_id)
        elif verdict.state == "corrupt" and stage_id in prepared.todo:
            with handle.claimed_briefly() as claim:
                if claim is not None and (aside := handle.set_aside(claim)) is not None:  # nobody else was faster
                    told = f"corrupt artifact {stage_id} ({verdict.reason}): set aside as {aside}, made again"
                    prepared.request.tell(told)


def _with_earlier(prepared: Prepared) -> Sweep:
    """Today's sweep with the folder's other rows."""
    today = prepared.sweep
    plan, dense = today.plan, {model.name: DenseModel.from_checkpoint(model.checkpoint) for model in prepared.models}
    if (earlier := recorded_sweep(today.out)) is not None:
        plan, dense = with_earlier_rows(plan, earlier.plan), {**earlier.dense, **dense}
    return Sweep(plan, today.store, today.out, dense)


def _report(prepared: Prepared) -> None:
    """Write and show the tables of all rows of the folder, as other commands have left them in the meantime: with those
    that another run has begun, and without those that were forgotten.
    """
    folder, request = read_sweep(prepared.sweep.out), prepared.request
    rows, update = folder.write_results()
    show_results(request.console, rows)
    if kept := kept_rows(prepared.sweep.plan, folder.plan):
        labels = ", ".join(cell.label for cell in kept)
        request.tell(f"rows of earlier runs: {labels}; to remove one: --forget '{kept[0].label}'")
    show_checkpoints(request.console, update)


def _exit_code(sweep: Sweep) -> int:
    """Return 0 if nothing is missing, 2 if the user can fix the cause, else 1."""
    missing = sweep.plan.lacking(lambda stage_id: sweep.store.handle(stage_id).is_committed())
    failures = [sweep.store.handle(stage_id).failure() for stage_id in missing]
    if any(failure is not None and failure.cause == "input" for failure in failures):
        return UserError.EXIT_CODE
    return 1 if missing else 0

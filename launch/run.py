"""Running a sweep: missing stages -> artifacts -> tables, on this machine or on a cluster."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial

from hfprune_launch.local.backend import LocalBackend
from hfprune_launch.local.warm import WarmProcess
from hfprune_launch.prepare import Prepared, require_runnable
from hfprune_launch.project import PROJECT
from hfprune_launch.screen import StageScreen
from hfprune_launch.slurm.cli import run_on_slurm
from hfprune_launch.stage.run import Provenance
from hfprune_launch.sweep_folder import Sweep, read_sweep, record_run, write_page

from hfprune_dist.errors import LostInputError, UserError
from hfprune_dist.planning.plan import kept_rows
from hfprune_dist.results.formats import counted
from hfprune_dist.store.atomic_files import require_usable
from hfprune_dist.store.attempts import Ledger


def run_to_tables(prepared: Prepared) -> int:
    """``run_missing``, then write and show the tables of all rows of the folder; return the exit code."""
    out, request = prepared.sweep.out, prepared.request
    code = run_missing(prepared)
    if code is not None:
        return code
    folder = read_sweep(out)  # with rows that another run has begun meanwhile, without those that were forgotten
    written = folder.write_results(request.console)
    if kept := kept_rows(prepared.sweep.plan, folder.plan):
        labels = ", ".join(cell.label for cell in kept)
        request.tell(f"rows of earlier runs: {labels}; to remove one: --forget '{kept[0].label}'")
    request.tell(f"written: {out / written[0]}, {', '.join(written[1:])}")
    return _exit_code(prepared.sweep)


class StageFailedError(RuntimeError):
    """A stage has failed for another reason than bad input."""


def only(prepared: Prepared, stage_ids: Iterable[str]) -> Prepared:
    """The same sweep, of which only these stages are to be made, and those that they need."""
    plan, verdicts = prepared.sweep.plan, prepared.verdicts
    return replace(prepared, todo=plan.lacking(lambda stage_id: verdicts[stage_id].state == "done", stage_ids))


def make(prepared: Prepared) -> None:
    """Run the missing stages; raises UserError for bad input, whoever finds it, StageFailedError for other failures."""
    plan, ledger = prepared.sweep.plan, Ledger(prepared.sweep.store)
    run_missing(prepared)
    for stage_id in prepared.todo:
        if (failure := ledger.failure(stage_id)) is not None:
            error = UserError if failure.cause == UserError.CAUSE else StageFailedError
            raise error(f"{plan.stages[stage_id].kind} failed: {failure.message}")
        if not ledger.store.handle(stage_id).is_committed():  # such as by a lost claim, which says nothing about it
            raise StageFailedError(f"{plan.stages[stage_id].kind} left no artifact; run the same command again")


def run_missing(prepared: Prepared) -> int | None:
    """Run missing stages, and write report.html after each; return an exit code if leaving before the last one ends.
    Raises UserError if stages can't run as asked for; nothing has been written then.
    """
    sweep, config, request = prepared.sweep, prepared.config, prepared.request
    out, hashes, code = sweep.out, sweep.store.hashes, None
    with closing(WarmProcess()) as warm:
        if prepared.todo and request.profile is None:
            warm.begin()  # what it imports takes as long as what is checked meanwhile
        require_runnable(prepared)
        require_usable(sweep.store.root)
        record_run(sweep, config, prepared.models)
        hashes.save()  # of input files; every stage that reads one compares its hash with the plan
        _clean_up(prepared)
        write_page(out, request.console)
        if not prepared.todo:
            return None
        provenance = Provenance(config.runtime, config.model_dump(), PROJECT.code_version())
        on_end = partial(write_page, out, request.console)
        if (profile := request.profile) is None:
            backend = LocalBackend(sweep.store, out / "logs", provenance, prepared.cancellation, warm)
            _run_here(prepared, backend, on_end)
        else:
            settings = provenance, profile, prepared.cancellation
            code = run_on_slurm(request.console, sweep, prepared.todo, *settings, follow=request.follow, on_end=on_end)
    hashes.save()
    return code


def _run_here(prepared: Prepared, backend: LocalBackend, on_end: Callable[[], object]) -> None:
    """Run missing stages in plan order; those that need a missing artifact are skipped. An artifact that a stage finds
    damaged is made again, and then the stage has another try.
    """
    sweep, request, todo = prepared.sweep, prepared.request, prepared.todo
    stages, store, waiting = sweep.plan.stages, sweep.store, deque(todo)
    tries: Counter[str] = Counter()
    every, ranks = counted(len(stages), "stage"), counted(backend.ranks, "rank")
    request.tell(f"{len(todo)} of {every} to run, {ranks} each; logs in {sweep.out / 'logs'}")
    screen = StageScreen(request.console, len(todo))
    with screen.live:
        while waiting:
            stage, began = stages[waiting.popleft()], time.monotonic()
            missing = next((stages[need] for need in stage.needs if not store.handle(need).is_done()), None)
            if missing is not None:
                screen.end(stage, "skipped", f": {missing.kind} {missing.label} is missing")
                continue
            failure = backend.run(stage, partial(screen.beat, stage))
            took = f" ({time.monotonic() - began:.1f} s)"
            screen.end(stage, "failed" if failure else "done", f"{took}\n  {failure.message}" if failure else took)
            tries[stage.id] += 1
            # Each try finds one of its artifacts at most; more tries than that mean a disk that damages them again.
            has_lost_input = failure is not None and failure.cause == LostInputError.CAUSE
            if has_lost_input and tries[stage.id] <= len(stage.needs):
                again = sweep.plan.lacking(lambda stage_id: store.handle(stage_id).is_done(), [stage.id])
                waiting.extendleft(reversed(again))
                screen.total += len(again)
            on_end()


def _clean_up(prepared: Prepared) -> None:
    """Set aside corrupt artifacts that are to be made again; tidy up after finished stages whose end nobody saw."""
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


def _exit_code(sweep: Sweep) -> int:
    """Return 0 if nothing is missing, 2 if the user can fix the cause, else 1."""
    missing = sweep.plan.lacking(lambda stage_id: sweep.store.handle(stage_id).is_committed())
    tried = (stage_id for stage_id in missing if not {*missing} & {*sweep.plan.stages[stage_id].needs})
    failures = [Ledger(sweep.store).failure(stage_id) for stage_id in tried]  # what others ended by is older
    is_input = any(failure is not None and failure.cause == UserError.CAUSE for failure in failures)
    return UserError.EXIT_CODE if is_input else int(bool(missing))

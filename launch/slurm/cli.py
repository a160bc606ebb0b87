"""Commands for a sweep on a Slurm cluster: submit, follow, show and cancel jobs, and show what would be submitted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import sleep

from hfprune_launch.project import PROJECT
from hfprune_launch.screen import ProgressLines, say
from hfprune_launch.slurm.commands import JobInfo, SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.decide import StageState, to_submit
from hfprune_launch.slurm.launcher import PAUSE_FACTOR, Event, Launcher
from hfprune_launch.slurm.observe import Observer, served_by
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.script import JobRequest, batch_script, default_threads
from hfprune_launch.slurm.snapshot import take_snapshot
from hfprune_launch.slurm.status import stage_statuses, status_table
from hfprune_launch.stage.run import Provenance
from hfprune_launch.sweep_folder import Sweep
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.results.formats import counted
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import refuse_world_writable
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.claims import Cancellation
from hfprune_dist.store.stage import kind_of

EVENT_COLORS = {"done": "green", "ended": "red", "waiting": "yellow"}
# Seconds after which what still keeps the sweep waiting is told again.
REMIND_S = 3600.0
# Seconds between two looks of --status at the store, and between two questions to Slurm.
STATUS_INTERVAL_S, SLURM_INTERVAL_S = 5.0, 60.0
# Seconds between two looks for jobs to cancel, and for which jobs and launchers that submit one are waited for.
LOOK_AGAIN_S, PATIENCE_S = 2.0, 60.0
# Between two stages, a sweep on this machine holds no claim for some seconds, while the ranks of the first one end.
LOOKS_AT_REST = 3
# States of stages on which nothing is known to be at work.
AT_REST = ("done", "failed", "died", "waiting", "missing", "not needed", "submitted")


def run_on_slurm(
    console: Console,
    sweep: Sweep,
    todo: Sequence[str],
    provenance: Provenance,
    profile: Profile,
    cancellation: Cancellation,
    *,
    follow: bool,
    on_end: Callable[[], object],
) -> int | None:
    """Submit missing stages and adopt running jobs, and stay until nothing more can be done; without ``follow``, return
    the exit code at once. ``on_end`` is called after a round in which stages' jobs have ended.
    """
    store, code, tell = sweep.store, sweep.out / "code", partial(say, console)
    refuse_world_writable(sweep.out, code, store.root, store.root / "attempts", store.root / "work")
    every = counted(len(sweep.plan.stages), "stage")
    tell(f"{len(todo)} of {every} to run on Slurm; logs in {store.root / 'attempts'}")
    snapshot = take_snapshot(PROJECT, code.resolve())
    screen = _Screen(console, sweep)
    launcher = Launcher(store, sweep.plan, provenance, profile, cancellation, snapshot, SlurmCommands(), screen.tell)

    def after_round() -> None:
        screen.refresh(launcher.observer.jobs)
        if screen.has_ends:
            screen.has_ends = False
            on_end()

    try:
        with screen.live:
            launcher.run(after_round, follow)
    except KeyboardInterrupt:
        tell("submitted jobs go on; --status shows them, --cancel ends them")
        raise
    if follow:
        return None
    if left := launcher.unsubmitted():
        names = ", ".join(f"{stage.kind} {stage.label}" for stage in left)
        tell(f"not submitted: {names}; run the same command again")
        return 1
    tell("jobs are submitted; --status shows them, the same command again follows them")
    return 0


def show_status(console: Console, sweep: Sweep, keep_on: bool) -> None:
    """Show the state of every stage; with ``keep_on``, live for as long as a stage is queued or running."""
    ledger = Ledger(sweep.store)
    observer = Observer(ledger, SlurmCommands(retry_delays_s=()))
    screen = _Screen(console, sweep)
    looked_at, starts = -math.inf, list[tuple[str, int]]()

    def is_committed(stage_id: str) -> bool:
        return sweep.store.handle(stage_id).is_committed()

    def jobs() -> Mapping[str, JobInfo] | None:
        """Return the jobs by name; None if this machine has no Slurm, or Slurm does not answer at once."""
        nonlocal looked_at, starts
        open_jobs = (ledger.open_job(stage_id) for stage_id in sweep.plan.stages if not is_committed(stage_id))
        attempts = [attempt for attempt in open_jobs if attempt is not None]
        try:
            seen = [(each.intent.job_name, len(each.runs())) for each in attempts]  # jobs and their starts
            if attempts and (seen != starts or time.monotonic() - looked_at >= SLURM_INTERVAL_S):
                observer.look(attempts)
                looked_at, starts = time.monotonic(), seen
        except SlurmUnavailableError as error:
            screen.tell(Event("waiting", message=f"Slurm does not answer ({error}): submitted jobs may wait or run"))
            return None
        return observer.jobs

    looks_at_rest = 0
    with screen.live:
        while keep_on and looks_at_rest < LOOKS_AT_REST:
            began = time.monotonic()
            looks_at_rest = 0 if screen.refresh(jobs()) else looks_at_rest + 1
            if not sweep.plan.lacking(is_committed):
                break
            sleep(max(STATUS_INTERVAL_S, PAUSE_FACTOR * (time.monotonic() - began)))
    console.print(status_table(stage_statuses(sweep.plan, sweep.store, jobs())))


def cancel_sweep(console: Console, sweep: Sweep) -> bool:
    """Cancel the sweep's jobs, whose saved work stays; return whether something goes on all the same."""
    slurm = SlurmCommands()
    slurm.require()
    job_ids, going_on = cancel_jobs(sweep.store, slurm)
    say(console, f"cancelled {counted(len(job_ids), 'job')}: {' '.join(job_ids)}".removesuffix(": "))
    for what in going_on:
        say(console, f"not cancelled yet: {what}; run the same command again")
    return bool(going_on)


def cancel_jobs(
    store: Store, slurm: SlurmCommands, pause: Callable[[float], object] = sleep
) -> tuple[list[str], list[str]]:
    """Cancel the jobs of all open attempts, and look again until there are none: a launcher may be submitting one at
    this moment, or a job may just have put itself back into the queue. Return the ids of the cancelled jobs, and what
    still runs, or may be submitted, after some time.
    """
    ledger = Ledger(store)
    observer = Observer(ledger, slurm)
    cancelled: set[str] = set()
    asked: set[str] = set()
    for _ in range(int(PATIENCE_S / LOOK_AGAIN_S)):
        attempts = ledger.open_jobs()
        # Launchers that may be submitting jobs at this moment hold claims, and have recorded no id.
        holders = {store.handle(each.intent.stage_id).holder() for each in attempts if each.job_id is None}
        submitting = sorted(f"{each} submits a job" for each in holders if each and each.lives and not each.job)
        observer.look(attempts)
        jobs = {attempt.intent.job_name: observer.jobs.get(attempt.intent.job_name) for attempt in attempts}
        found = [job for job in jobs.values() if job is not None and job.is_live and job.state != "COMPLETING"]
        # Pending jobs come first: they would start when the jobs that they wait for are gone.
        found.sort(key=lambda job: (not job.is_waiting, int(job.job_id)))
        slurm.cancel([job.job_id for job in found])
        cancelled |= {job.job_id for job in found}
        for name in {name for name, job in jobs.items() if job is None} - asked:
            slurm.cancel([job_id] if (job_id := slurm.find(name)) else [])  # squeue may have missed it
        asked |= jobs.keys()
        if not found and not submitting:
            break
        pause(LOOK_AGAIN_S)
    return sorted(cancelled, key=int), [*submitting, *(f"job {job.job_id}" for job in found)]


def show_jobs(console: Console, sweep: Sweep, profile: Profile, runtime: RuntimeConfig, todo: Sequence[str]) -> None:
    """Show what would be submitted to run the stages in ``todo``: every batch script."""
    stages, serves = sweep.plan.stages, served_by(sweep.plan)
    states = {
        stage.id: StageState(stage.id, tuple(stage.needs), serves[stage.id], stage.id in todo, stage.id not in todo)
        for stage in stages.values()
    }
    jobs = to_submit(states, profile.allocation)
    first = {stage_id: chain[0] for chain in jobs for stage_id in chain}
    for chain in jobs:
        needs = {first[need] for stage_id in chain for need in stages[stage_id].needs if need in first} - {chain[0]}
        resources = profile.of_job([kind_of(stage_id) for stage_id in chain])
        # <...> stands for what is known only when it is submitted.
        request = JobRequest(
            resources=resources,
            folders=[sweep.store.root.resolve() / "attempts" / stage_id / "<n>" for stage_id in chain],
            name=f"hfprune-{chain[0].replace('/', '-')[:-12]}-<n>-<token>",
            snapshot=sweep.out.resolve() / "code" / "<digest>",
            threads=default_threads(resources, runtime.threads_per_rank),
            shared=f"hfprune-<1 to {profile.max_running}>" if profile.max_running else "",
            dependencies=[
                *(f"afterok:<job of {need}>" for need in sorted(needs)),
                *["singleton"] * bool(profile.max_running),
            ],
        )
        say(console, "\n# " + ", then ".join(f"{stages[each].kind} {stages[each].label}" for each in chain))
        say(console, batch_script(request))
    say(console, f"{counted(len(todo), 'stage')} in {counted(len(jobs), 'job')}")


class _Screen:
    """A live table on a terminal, occasional lines of progress elsewhere, and always one line per event."""

    def __init__(self, console: Console, sweep: Sweep) -> None:
        self.live = Live(console=console, transient=True, auto_refresh=False)  # nothing where there is no terminal
        self._console = console
        self._sweep = sweep
        self._told_at: dict[str, float] = {}
        self._lines = ProgressLines(console)
        self.has_ends = False  # whether a stage's attempt has ended

    def refresh(self, jobs: Mapping[str, JobInfo] | None) -> bool:
        """Update the shown state; return whether a stage is queued or running, or may be."""
        statuses = stage_statuses(self._sweep.plan, self._sweep.store, jobs)
        for status in statuses:
            if status.state == "running":
                self._lines.tell(status.stage, status.progress, status.left)
        busy_first = sorted(statuses, key=lambda each: (each.state in AT_REST, each.state == "queued"))
        self.live.update(status_table(busy_first), refresh=True)  # of which a terminal shows the beginning
        return jobs is None or any(status.state not in AT_REST for status in statuses)

    def tell(self, event: Event) -> None:
        """Print an event; one about waiting, of which every round tells, only once in ``REMIND_S``."""
        self.has_ends |= event.what in ("done", "ended")
        if event.what == "waiting":
            if time.monotonic() - self._told_at.get(event.message, -math.inf) < REMIND_S:
                return
            self._told_at[event.message] = time.monotonic()
        color = EVENT_COLORS.get(event.what, "cyan")
        stage = f" {event.stage.kind} {escape(event.stage.label)}" if event.stage is not None else ""
        job = f" job {event.job_id}" if event.job_id else ""
        message = f": {escape(event.message)}" if event.message else ""
        self._console.print(f"[{color}]{event.what}[/]{stage}{job}{message}", highlight=False, soft_wrap=True)

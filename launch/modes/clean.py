"""Implementation of launch/clean.py: list what nothing refers to, with its size, and remove it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from hfprune_launch.screen import make_console, say
from hfprune_launch.slurm.observe import inputs_of_live_jobs
from hfprune_launch.sweep_folder import Sweep, read_sweep

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.leftovers import Leftover, files_of, running, unused

CONFIG = "config.json"  # which every checkpoint has
REASON = "an intermediate checkpoint of finished rows"


def clean(out: Path, *, intermediates: bool, dry_run: bool) -> None:
    """Remove what nothing refers to, and list it.

    Args:
        intermediates: also remove the checkpoints that finished rows have been recovered from.

    Raises:
        UserError: if the folder is not a sweep's, or one of its stages is running, or begins meanwhile; once all else
            is removed, for what can't be, such as another user's.
    """
    sweep = read_sweep(out)
    store = sweep.store
    _refuse_while_needed(store)
    jobs = inputs_of_live_jobs(store)
    used = {*jobs, *(need for needs in jobs.values() for need in needs)}
    found = list(unused(store, {*sweep.plan.stages, *used}, about_to_run=jobs))
    if intermediates:
        found += _intermediates(sweep, used)
    staying: list[str] = []
    _refuse_while_needed(store)  # they were looked for, and measured, over minutes
    gone = found if dry_run else list(_removed(found, staying))
    remarks = [] if dry_run else sweep.write_checkpoints().remarks
    # Shown once all is done, as a reader such as head may end the command.
    console = make_console()
    if jobs:
        say(console, f"note: the jobs of {', '.join(jobs)} may still wait or run, so what they need stays")
    for leftover in gone:
        say(console, f"{leftover.size_bytes:>15,} bytes  {leftover.path}: {leftover.reason}")
    total = sum(leftover.size_bytes for leftover in gone)
    say(console, f"{total:>15,} bytes {'would be removed' if dry_run else 'removed'}")
    for remark in remarks:
        say(console, f"note: {remark}")
    if staying:
        raise UserError("\n".join(staying))


def _removed(found: Iterable[Leftover], staying: list[str]) -> Iterator[Leftover]:
    """Remove leftovers and yield those that are gone; add to ``staying`` why others aren't."""
    for leftover in found:
        try:
            leftover.remove()
        except UserError as error:
            staying.append(str(error))
        else:
            yield leftover


def _refuse_while_needed(store: Store) -> None:
    if store.root.is_symlink():
        raise UserError(f"{store.root} is a link, so other sweeps may use what is there; nothing is removed")
    if stages := running(store):
        running_now = f"{', '.join(stages)} {'is' if len(stages) == 1 else 'are'} running"
        raise UserError(f"{store.root}: {running_now}; let the sweep end, or cancel it")


def _intermediates(sweep: Sweep, used: set[str]) -> Iterator[Leftover]:
    """Yield checkpoints that belong to no row and that no missing stage reads.

    Args:
        used: ids of stages whose artifacts are in use in another way.
    """
    plan, store = sweep.plan, sweep.store
    missing = plan.lacking(lambda stage_id: store.handle(stage_id).is_done())
    kept = {*used, *plan.asked, *(result for cell in plan.cells for result in cell.results)}
    kept |= {need for stage_id in missing for need in plan.stages[stage_id].needs}
    for handle in (store.handle(stage_id) for stage_id in plan.stages if stage_id not in kept):
        if CONFIG in (handle.manifest() or {}).get("files", {}) and (leftover := files_of(handle, REASON)).size_bytes:
            yield leftover

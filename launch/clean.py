"""Free disk space in a sweep's folder by removing what no row of its tables refers to any more.

examples:
  python launch/clean.py runs/demo --dry-run          show what would be removed, and its size in bytes
  python launch/clean.py runs/demo
  python launch/clean.py runs/demo --intermediates    also remove intermediate checkpoints of finished rows

Removed: artifacts and progress of rows that were removed (--forget) or replaced by others, drafts of stages that
ended early, artifacts that failed verification, and files that stages share, which are made again when needed. Kept:
rows, tables, named checkpoints and logs.

--intermediates removes checkpoints that finished rows were made from: pruned ones, also those in store/prune/ that a
card names as its adapter's base, and trained ones of earlier rounds. They are made again only if something needs them,
such as another recovery of the same pruned model. Scores of calibration passes stay, so another ratio costs as much as
before.

exit codes: 0 done; 2 a stage runs or is queued, something can't be removed, or bad input
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser, path_given
from hfprune_launch.screen import make_console, say
from hfprune_launch.slurm.observe import stages_of_live_jobs
from hfprune_launch.sweep_folder import Sweep, read_sweep

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import MANIFEST, StageHandle, Store
from hfprune_dist.store.atomic_files import listed

# Folders of files that stages share; a stage makes such a file anew if it is missing.
SHARED = {
    "rows": "packed training rows, which a recovery packs again",
    "layers": "checks and orders of layers, which stages make again",
}
FINGERPRINT = re.compile(r"[0-9a-f]{20}")


@dataclass(frozen=True)
class Leftover:
    """A folder that can be removed."""

    path: Path
    reason: str  # why nothing needs it
    remove: Callable[[], Path | None]  # returns where files stay that can't be removed, unless in ``path``
    stays: str = ""  # name of a file in it that isn't to be removed

    def bytes(self) -> int:
        """Return the size of the files that are to be removed, or that could not be: another user's stay."""
        files = [Path(where, name) for where, _, names in os.walk(self.path) for name in names if name != self.stays]
        return sum(file.lstat().st_size for file in files if os.path.lexists(file))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Remove what nothing refers to, and list it."""
    parser = make_parser(__doc__)
    parser.add_argument("out", type=path_given, help="folder of a sweep, e.g. runs/demo")
    also = "also remove the files of checkpoints, pruned or of earlier rounds, that finished rows were made from"
    parser.add_argument("--intermediates", action="store_true", help=also)
    parser.add_argument("--dry-run", action="store_true", help="show what would be removed; removes nothing")
    arguments = parser.parse_args(argv)
    sweep, dry_run = read_sweep(arguments.out), arguments.dry_run
    store = sweep.store
    _refuse_while_needed(store)
    found = list(_leftovers(sweep, arguments.intermediates))
    sizes = [leftover.bytes() for leftover in found]
    _refuse_while_needed(store)  # they were looked for, and measured, over minutes
    remains = [] if dry_run else [replace(each, path=each.remove() or each.path) for each in found]
    staying = {each.path: size for each in remains if (size := each.bytes())}
    freed = sum(sizes) - sum(staying.values())
    remarks = [] if dry_run else sweep.write_checkpoints().remarks
    # Shown once all is done, as a reader such as head may end the command.
    console = make_console()
    for leftover, size in zip(found, sizes, strict=True):
        say(console, f"{size:>15,} bytes  {leftover.path}: {leftover.reason}")
    say(console, f"{freed:>15,} bytes {'would be removed' if dry_run else 'removed'}")
    for remark in remarks:
        say(console, f"note: {remark}")
    if staying:
        paths = ", ".join(map(str, staying))
        raise UserError(f"{paths}: part of it can't be removed; is it another user's, or in use?")
    return 0


def _refuse_while_needed(store: Store) -> None:
    if store.root.is_symlink():
        raise UserError(f"{store.root} is a link, so other sweeps may use what is there; nothing is removed")
    handles = (handle for kind in KINDS for handle in _handles(store, store.root / "work" / kind))
    holders = ((handle.id, handle.holder()) for handle in handles)
    running = [stage_id for stage_id, holder in holders if holder is not None and holder.lives]
    if found := running or stages_of_live_jobs(store):
        raise UserError(f"{store.root}: {', '.join(found)} runs, or may run; let it end, or cancel it")


def _leftovers(sweep: Sweep, intermediates: bool) -> Iterator[Leftover]:
    """Yield everything that the stages of a sweep don't need: other artifacts and their progress, drafts, artifacts
    that failed verification, and shared files; with ``intermediates``, also what rows have been trained from.

    To be called only while no stage runs: the drafts of running stages would be included.
    """
    store, kept = sweep.store, sweep.plan.stages
    whole: list[tuple[Path, str]] = []
    for kind in KINDS:
        whole += [(draft, "a draft of a stage that ended early") for draft in listed(store.root / kind, ".draft-*")]
        for handle in _handles(store, store.root / kind):
            if handle.id not in kept:
                yield Leftover(handle.artifact, "an artifact of no row of the tables", handle.discard)
        others = (handle.work for handle in _handles(store, store.root / "work" / kind) if handle.id not in kept)
        whole += [(work, "progress of a stage of no row of the tables") for work in others]
    whole += [(path, "an artifact that failed verification") for path in listed(store.root / "quarantine", "*")]
    whole += [(store.root / name, what) for name, what in SHARED.items() if (store.root / name).is_dir()]
    for path, reason in whole:
        yield Leftover(path, reason, partial(shutil.rmtree, path, ignore_errors=True))
    if intermediates:
        yield from _intermediates(sweep)


def _handles(store: Store, folder: Path) -> list[StageHandle]:
    """Return the stages of one kind that have a subfolder in a folder; anything else in it is not ours."""
    names = [path.name for path in listed(folder, "*") if path.is_dir() and FINGERPRINT.fullmatch(path.name)]
    return [store.handle(f"{folder.name}/{name}") for name in names]


def _intermediates(sweep: Sweep) -> Iterator[Leftover]:
    """Yield checkpoints that belong to no row and that no missing stage reads."""
    plan, store = sweep.plan, sweep.store
    missing = plan.lacking(lambda stage_id: store.handle(stage_id).is_done())
    kept = {*plan.asked, *(result for cell in plan.cells for result in cell.results)}
    kept |= {need for stage_id in missing for need in plan.stages[stage_id].needs}
    for handle in (store.handle(stage_id) for stage_id in plan.stages if stage_id not in kept):
        leftover = Leftover(handle.artifact, "an intermediate checkpoint of finished rows", handle.empty, MANIFEST)
        if "config.json" in (handle.manifest() or {}).get("files", {}) and leftover.bytes():
            yield leftover

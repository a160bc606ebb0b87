"""Cancellation of a sweep that runs on this machine: its process ends its ranks and then itself, as on Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep

from hfprune_launch.stage.stage_state import name_of

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import Holder
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle

# Time that a launcher may take to end; it gives its ranks 20 s.
WAIT_S = 30.0
POLL_S = 0.1
# Between two stages, a launcher holds no claim while the ranks of the first one end.
BETWEEN_STAGES_S = 5.0


@dataclass(frozen=True)
class Running:
    """A running stage, and the launcher that holds its claim."""

    stage: Stage
    handle: StageHandle
    holder: Holder

    def goes_on(self) -> bool:
        claim = self.handle.open_claim()
        return claim is not None and claim.lives and claim.holder == self.holder

    def __str__(self) -> str:
        return f"{self.stage.kind} {self.stage.label}: {name_of(self.holder)}"


def running_without_job(plan: Plan, store: Store) -> list[Running]:
    """Return the stages that launchers run themselves, not in jobs of a batch system, in plan order."""
    running = []
    for stage in plan.stages.values():
        handle = store.handle(stage.id)
        claim = handle.open_claim()
        if claim is not None and claim.lives and claim.holder.job is None:
            running.append(Running(stage, handle, claim.holder))
    return running


def wait_for_running(plan: Plan, store: Store) -> list[Running]:
    """As ``running_without_job``; if nothing runs but stages are missing, wait some seconds for one to begin."""
    deadline = time.monotonic() + BETWEEN_STAGES_S
    while not (running := running_without_job(plan, store)) and time.monotonic() < deadline:
        if not plan.lacking(lambda stage_id: store.handle(stage_id).is_committed()):
            break
        sleep(POLL_S)
    return running


def cancel_running(plan: Plan, store: Store, running: list[Running]) -> Iterator[str]:
    """Interrupt launchers, and those that have taken over their stages meanwhile; yield a message about each."""
    interrupted: list[tuple[Stage, Holder]] = []
    while running:
        yield from _interrupt_each(running)
        interrupted += [(it.stage, it.holder) for it in running]
        running = [it for it in running_without_job(plan, store) if (it.stage, it.holder) not in interrupted]


def _interrupt_each(running: list[Running]) -> Iterator[str]:
    for it in running:
        kill = f"kill {it.holder.pid}"
        if not it.holder.is_running():  # its claim is being renewed, but its process can't be seen from here
            yield f"not cancelled: {it} runs elsewhere; on its machine, Ctrl-C or {kill} ends it"
        elif not _interrupt(it.holder.pid):
            yield f"not cancelled: {it} is another user's, who can end it by Ctrl-C or {kill}"
        elif _ends(it):
            yield f"cancelled: {it} has stopped work on it; what was saved stays, and the same command continues"
        else:
            yield f"not cancelled yet: {it} was interrupted but is still at work on it; {kill} ends it"


def _interrupt(pid: int) -> bool:
    """Interrupt a process and return whether that was permitted; True if it has already ended."""
    # In a notebook, SIGINT ends the cell but not the kernel. Background processes of a script ignore it.
    number = signal.SIGTERM if _ignores(pid, signal.SIGINT) else signal.SIGINT
    try:
        os.kill(pid, number)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def _ignores(pid: int, number: signal.Signals) -> bool:
    """Return whether a process ignores a signal; False if that can't be seen, as on systems other than Linux."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    masks = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def _ends(running: Running) -> bool:
    """Wait for an interrupted launcher to leave its stage; return whether it did so in time."""
    deadline = time.monotonic() + WAIT_S
    while running.goes_on():
        if time.monotonic() > deadline:
            return False
        sleep(POLL_S)
    return True

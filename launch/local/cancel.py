"""Cancellation of what launchers run themselves: they see the store's token, end their ranks and then themselves."""

from __future__ import annotations

import time

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.claims import Holder
from hfprune_dist.store.stage import Stage

# Time that a launcher may take to end; it looks for the token every second and waits up to 10 s for killed ranks.
WAIT_S = 40.0
POLL_S = 0.1


def running_without_job(plan: Plan, store: Store) -> dict[Holder, Stage]:
    """Return the launchers that run stages themselves, not in jobs of a batch system, each with its stage."""
    running, ledger = {}, Ledger(store)
    for stage in plan.stages.values():
        holder = store.handle(stage.id).holder()
        if holder and holder.lives and holder.job is None and ledger.open_job(stage.id) is None:
            running[holder] = stage
    return running


def wait_until_cancelled(plan: Plan, store: Store) -> list[str]:
    """Wait for launchers to leave their stages once a cancellation has been requested; return a message about each."""
    deadline, seen, running = time.monotonic() + WAIT_S, dict[Holder, Stage](), running_without_job(plan, store)
    while running and time.monotonic() < deadline:
        seen |= running
        time.sleep(POLL_S)
        running = running_without_job(plan, store)
    what = {holder: f"{stage.kind} {stage.label}: {holder}" for holder, stage in (seen | running).items()}
    return [
        f"not cancelled yet: {name} is still at work on it; on its machine, kill {holder.pid} ends it"
        if holder in running
        else f"cancelled: {name} has stopped work on it; what was saved stays, and the same command continues"
        for holder, name in what.items()
    ]

"""Cancellation of what launchers run themselves: they see the store's token, end their ranks and then themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.claims import Holder
from hfprune_dist.store.stage import Stage

# Time that a launcher may take to end; it looks for the token every second and waits up to 10 s for killed ranks.
WAIT_S = 40.0
POLL_S = 0.1


class Running(NamedTuple):
    """A running stage, and the launcher that holds its claim."""

    stage: Stage
    handle: StageHandle
    holder: Holder

    def goes_on(self) -> bool:
        claim = self.handle.open_claim()
        return claim is not None and claim.lives and claim.holder == self.holder


def running_without_job(plan: Plan, store: Store) -> list[Running]:
    """Return the stages that launchers run themselves, not in jobs of a batch system, in plan order."""
    running, ledger = [], Ledger(store)
    for stage in plan.stages.values():
        handle = store.handle(stage.id)
        claim = handle.open_claim()
        if claim and claim.lives and claim.holder.job is None and ledger.open_job(stage.id) is None:
            running.append(Running(stage, handle, claim.holder))
    return running


def wait_until_cancelled(running: Sequence[Running]) -> Iterator[str]:
    """Wait for launchers to leave their stages once a cancellation has been requested; yield a message about each."""
    deadline = time.monotonic() + WAIT_S
    for each in running:
        while (goes_on := each.goes_on()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        name = f"{each.stage.kind} {each.stage.label}: {each.holder}"
        if goes_on:
            yield f"not cancelled yet: {name} is still at work on it; on its machine, kill {each.holder.pid} ends it"
        else:
            yield f"cancelled: {name} has stopped work on it; what was saved stays, and the same command continues"

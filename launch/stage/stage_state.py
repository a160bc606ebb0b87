"""The state of a stage according to its files, whichever backend runs it, and the wording of its progress."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from hfprune_dist.store.artifacts import StageHandle
from hfprune_dist.store.claims import Holder, OpenClaim
from hfprune_dist.store.heartbeat import Heartbeat, in_one_line
from hfprune_dist.store.stage import Stage

# A running stage without a sign of life for this long may hang, though a step of a large model may take as long.
STALE_MINUTES = 5
MINUTE_S, HOUR_S = 60, 3600


@dataclass(frozen=True)
class StageState:
    """The state of a stage.

    Attributes:
        state: running: its claim is held; died: the claim's holder ended without giving a reason; waiting: an artifact
            that it needs is missing; missing: it could run.
        detail: who runs it, why it failed, or what it waits for.
    """

    state: Literal["done", "running", "failed", "died", "waiting", "missing"]
    detail: str


def state_of(stage: Stage, handle: StageHandle, claim: OpenClaim | None) -> StageState:
    """Return the state of a stage.

    Args:
        claim: claim on the stage, as returned by ``handle.open_claim``; None if it is known that nobody runs it.
    """
    if handle.is_committed():
        return StageState("done", "")
    if claim is not None and claim.lives:
        return StageState("running", name_of(claim.holder))
    if (failure := handle.failure()) is not None:
        return StageState("failed", f"{failure.cause}: {in_one_line(failure.message)}")
    if claim is not None:
        return StageState("died", f"{name_of(claim.holder)} ended without giving a reason; run the same command again")
    missing = [need for need in stage.needs if not handle.store.handle(need).is_committed()]
    return StageState("waiting", f"for {missing[0]}") if missing else StageState("missing", "")


def name_of(holder: Holder) -> str:
    """Name the job or process that holds a claim, and its host if that is not this one."""
    place = "" if holder.host == socket.gethostname() else f" on {holder.host}"
    return f"process {holder.pid}{place}" if holder.job is None else f"job {holder.job}{place}"


def staleness(signs: list[float], now: float) -> str:
    """Say for how long a running stage has given no sign of life; empty if that is not long.

    Args:
        signs: unix times of signs of life, including that of the start.
    """
    minutes = int((now - max(signs, default=now)) / MINUTE_S)
    return f"stale for {minutes} min" if minutes >= STALE_MINUTES else ""


def time_left(heartbeat: Heartbeat | None) -> str:
    """Return the time until the end of the current phase; empty if it isn't known yet."""
    seconds = None if heartbeat is None else heartbeat.seconds_left
    if seconds is None:
        return ""
    if seconds >= 2 * HOUR_S:
        return f"{seconds / HOUR_S:.1f} h"
    return f"{seconds / MINUTE_S:.0f} min" if seconds >= 2 * MINUTE_S else f"{seconds:.0f} s"

"""What has become of a stage by its files alone, whichever backend runs it, and how its progress is told."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from hfprune_dist.store.claims import Holder, OpenClaim
from hfprune_dist.store.heartbeat import Heartbeat, in_one_line
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle

# Without a sign of life for so long, a running stage may hang; a step of a large model may take as long.
STALE_MINUTES = 5
MINUTE_S, HOUR_S = 60, 3600


@dataclass(frozen=True)
class Standing:
    """How a stage stands.

    Attributes:
        state: running: somebody holds its claim; died: who held it has ended without a word; waiting: for what it
            needs; missing: it could run.
        detail: who runs it, why it failed, what it waits for.
    """

    state: Literal["done", "running", "failed", "died", "waiting", "missing"]
    detail: str


def standing_of(stage: Stage, handle: StageHandle, claim: OpenClaim | None) -> Standing:
    """How a stage stands.

    Args:
        claim: on the stage, as ``handle.open_claim`` gives it; None where it is known that nobody is at work.
    """
    if handle.is_committed():
        return Standing("done", "")
    if claim is not None and claim.lives:
        return Standing("running", name_of(claim.holder))
    if (failure := handle.failure()) is not None:
        return Standing("failed", f"{failure.cause}: {in_one_line(failure.message)}")
    if claim is not None:
        return Standing("died", f"{name_of(claim.holder)} has ended without a word; the same command goes on")
    missing = [need for need in stage.needs if not handle.store.handle(need).is_committed()]
    return Standing("waiting", f"for {missing[0]}") if missing else Standing("missing", "")


def name_of(holder: Holder) -> str:
    """A job, or a process; and its host where that is another one."""
    place = "" if holder.host == socket.gethostname() else f" on {holder.host}"
    return f"process {holder.pid}{place}" if holder.job is None else f"job {holder.job}{place}"


def staleness(signs: list[float], now: float) -> str:
    """For how long a running stage has given no sign of life; empty where that is not long.

    Args:
        signs: unix times, among them that of the start.
    """
    minutes = int((now - max(signs, default=now)) / MINUTE_S)
    return f"stale for {minutes} min" if minutes >= STALE_MINUTES else ""


def time_left(heartbeat: Heartbeat | None) -> str:
    """Until the end of the current phase; empty where nobody can tell yet."""
    seconds = None if heartbeat is None else heartbeat.seconds_left
    if seconds is None:
        return ""
    if seconds >= 2 * HOUR_S:
        return f"{seconds / HOUR_S:.1f} h"
    return f"{seconds / MINUTE_S:.0f} min" if seconds >= 2 * MINUTE_S else f"{seconds:.0f} s"

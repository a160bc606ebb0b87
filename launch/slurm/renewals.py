"""Renewals of a claim while its holder does something else, such as a stage's work, or waiting for Slurm's answer."""

from __future__ import annotations

import contextlib
import threading

from hfprune_dist.store.claims import Claim, ClaimLostError, Renewal

POLL_S = 1.0


def keep_renewed(claim: Claim) -> threading.Event:
    """Renew a claim from a thread until it is released or lost, or the returned event is set."""
    enough = threading.Event()
    threading.Thread(target=renew, args=(Renewal(claim), enough), daemon=True).start()
    return enough


def renew(renewal: Renewal, enough: threading.Event) -> None:
    """Renew a claim until it is released or lost, which its holder notices by itself, or until it is enough."""
    with contextlib.suppress(ClaimLostError):
        while not enough.wait(POLL_S):
            renewal.tick()

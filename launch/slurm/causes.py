"""Causes of the ends of attempts, as records and messages name them, and how often a launcher tries again for each."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Cause(StrEnum):
    """Why an attempt ended. Some are also causes of failures that ranks report (``UserError.CAUSE`` etc.)."""

    DONE = "done"
    """The artifact is there and verified."""
    INTERRUPTED = "interrupted"
    """By preemption, or a time limit before which the job got further; it goes on from what is saved."""
    BAD_NODE = "bad node"
    """A node died, or can't run the stage."""
    KILLED = "killed"
    """A rank died without a message, or waited in vain for another one."""
    LOST_INPUT = "lost input"
    """An artifact that the stage reads is damaged; it is made again."""
    NOT_RUN = "not run"
    """The job never began the stage: its launcher died while it submitted, a job that it needs did not succeed, or
    another process had the stage."""
    NOT_ACCEPTED = "not accepted"
    """The queue is full, or a job that this one needs has just ended; its folder is used again for the next try."""
    OUT_OF_MEMORY = "out of memory"
    CANCELLED = "cancelled"
    INPUT = "input"
    """The user can correct it, in the profile too."""
    CODE = "code"
    """A mistake in this project."""


# Cause -> how often a launcher tries again by itself; 0 for the others. A new run of the command always tries again.
RETRIES: Mapping[str, int] = {
    Cause.INTERRUPTED: 1000,
    Cause.BAD_NODE: 5,
    Cause.KILLED: 2,
    Cause.LOST_INPUT: 2,
    Cause.NOT_RUN: 100,  # a job may be dropped each time that one which it needs is interrupted
    Cause.NOT_ACCEPTED: 1_000_000,
}

"""Causes of the ends of attempts, as records and messages name them, and how often a launcher tries again for each."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Cause(StrEnum):
    """Why an attempt ended. Some are also causes of failures that ranks report (``UserError.CAUSE`` etc.)."""

    DONE = "done"
    """The artifact is there and verified."""
    PREEMPTED = "preempted"
    NODE_FAILURE = "node failure"
    BAD_NODE = "bad node"
    """A node can't run the stage, or could not start it."""
    NODES_NEEDED = "avoided node needed"
    """Slurm ended the job before it started, as it avoided nodes that it can't do without."""
    TIME_LIMIT = "time limit"
    """The job got further than its earlier starts."""
    NO_PROGRESS = "time limit without progress"
    INTERRUPTED = "interrupted"
    """The work is saved, but the job could not requeue itself."""
    KILLED = "killed"
    """A rank died without a message."""
    CRASH = "crash"
    COLLECTIVE_TIMEOUT = "collective timeout"
    LOST_INPUT = "lost input"
    """An artifact that the stage reads is damaged; it is made again."""
    LOST_JOB = "lost job"
    """The launcher died while it submitted."""
    DEPENDENCY = "dependency"
    """Slurm dropped the job, as one on which it depends did not succeed."""
    DUPLICATE = "duplicate"
    """Another process runs the stage."""
    QUEUE_FULL = "submit limit"
    """Slurm did not accept the job, as the user has too many."""
    NEED_ENDED = "need ended"
    """Slurm did not accept the job, as one for which it was to wait had already ended."""
    OUT_OF_MEMORY = "out of memory"
    RESOURCE_LIMIT = "resource limit"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    """Slurm refuses a job with these options."""
    INPUT = "input"
    """The user can correct it."""
    CODE = "code"
    """A mistake in this project."""


# Causes of attempts that ended before Slurm accepted their job; the folder is used again for the next try.
NOT_ACCEPTED = (Cause.QUEUE_FULL, Cause.NEED_ENDED)
# Cause -> how often a launcher tries again by itself. A new run of the command always tries again.
RETRIES: Mapping[str, int] = {
    Cause.PREEMPTED: 1000,
    Cause.NODE_FAILURE: 10,
    Cause.BAD_NODE: 3,
    Cause.NODES_NEEDED: 3,
    Cause.TIME_LIMIT: 1000,  # only if the job got further, as it then does each time, and so comes to an end
    Cause.INTERRUPTED: 20,
    Cause.KILLED: 2,
    Cause.CRASH: 2,
    Cause.COLLECTIVE_TIMEOUT: 2,
    Cause.LOST_INPUT: 2,
    Cause.LOST_JOB: 3,
    Cause.DEPENDENCY: 50,  # ends with the retries of what it depends on
    Cause.DUPLICATE: 20,
    Cause.QUEUE_FULL: 1_000_000,
    Cause.NEED_ENDED: 1_000_000,
    Cause.NO_PROGRESS: 0,
    Cause.OUT_OF_MEMORY: 0,
    Cause.RESOURCE_LIMIT: 0,
    Cause.CANCELLED: 0,
    Cause.REFUSED: 0,
    Cause.INPUT: 0,
    Cause.CODE: 0,
}

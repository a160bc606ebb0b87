"""Nodes at fault in earlier attempts, which later ones avoid unless Slurm can't do without them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hfprune_launch.slurm.attempt_records import SCRIPT, read_script
from hfprune_launch.slurm.attempts import JobAttempt
from hfprune_launch.slurm.causes import Cause
from hfprune_launch.slurm.log_signs import first_death

# The nodes at fault in this many previous attempts are avoided.
EXCLUDING_ATTEMPTS = 3
NODE_AT_FAULT = re.compile(
    r"srun: error: Node failure on (\S+)|task launch for .* failed on node ([^\s:]+)", re.IGNORECASE
)


def nodes_at_fault(cause: str, text: str, attempt: JobAttempt) -> list[str]:
    """Return the nodes at fault: those that the log names, else the only node of the job's last start."""
    if cause not in (Cause.NODE_FAILURE, Cause.BAD_NODE):
        return []
    named = {first or second for first, second in NODE_AT_FAULT.findall(text)}
    death = first_death(text)
    if not named and death is not None:
        named = {death.node}
    if not named and (runs := attempt.runs()):
        named = {runs[-1].nodes}
    return sorted(node for node in named if node and "[" not in node and "," not in node)


def nodes_to_avoid(attempts: Sequence[JobAttempt]) -> list[str]:
    """Return the nodes that a stage's next job avoids; none if the last job could not start without them."""
    ends = [end for attempt in attempts if (end := attempt.end) is not None]
    if ends and ends[-1].cause == Cause.NODES_NEEDED:
        return []
    return sorted({node for end in ends[-EXCLUDING_ATTEMPTS:] for node in end.bad_nodes})


def avoided_by(attempt: JobAttempt, attempts: Sequence[JobAttempt]) -> list[str]:
    """Return the nodes that an attempt's job avoids, apart from those that its profile excludes.

    Args:
        attempts: all attempts at its stage.
    """
    excluded = re.search("^#SBATCH --exclude=(.*)$", read_script(attempt.folder / SCRIPT), re.MULTILINE)
    names = excluded[1].strip("'").split(",") if excluded else []
    at_fault = {node for it in attempts if (end := it.end) is not None for node in end.bad_nodes}
    return sorted(at_fault.intersection(names))

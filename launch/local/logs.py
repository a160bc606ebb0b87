"""The logs of stages that run on this machine: a file for each attempt, saying when it began and if it succeeded.

They stay when the artifact is lost and made again.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from hfprune_launch.stage.logs import end_of_log

from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.stage import Stage

# ``<kind>-<fingerprint>`` of a stage -> its logs, by attempt number.
LogsOfStages = Mapping[str, Mapping[int, Path]]

# Part of a log's first line: the number of ranks among torchrun's options.
RANKS = re.compile(r"--nproc-per-node=(\d+)")
# The last line of a log whose attempt made the artifact.
DONE = "done: the artifact is in the store"


def log_of(folder: Path, stage: Stage, number: int) -> Path:
    """Return the log of an attempt in the folder of a sweep's logs."""
    return folder / f"{stage.kind}-{stage.fingerprint}.{number}.log"


def logs_below(folder: Path, pattern: str = "*.*.log") -> LogsOfStages:
    """Find the logs of all stages of a sweep, or those of a pattern, in a single pass over their folder."""
    found: dict[str, dict[int, Path]] = {}
    for log in listed(folder, pattern):
        stage, *_, number, _ = log.name.split(".")
        found.setdefault(stage, {})[int(number) if number.isdecimal() else 0] = log
    return found


def last_number(folder: Path, stage: Stage) -> int:
    """Return the number of the last attempt at a stage that has a log; 0 if none has."""
    of_stages = logs_below(folder, f"{stage.kind}-{stage.fingerprint}.*.log").values()
    return max((number for logs in of_stages for number in logs), default=0)


def first_line(stage: Stage, command: Sequence[str]) -> str:
    """Return the first line of a log: the time, the stage and the command that runs it."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {stage.kind} {stage.label} ({stage.id}): {shlex.join(command)}\n"


def beginning(log: Path) -> tuple[float | None, int | None]:
    """Return unix time and ranks from a log's first line, as the backend writes it; None if it is something else.

    The line begins with the time and its offset from UTC.
    """
    try:
        with log.open(encoding="utf-8", errors="replace") as stream:
            first = stream.readline()
        started = datetime.fromisoformat(" ".join(first.split(" ", 2)[:2])).timestamp()
    except (OSError, ValueError, OverflowError):
        return None, None
    ranks = RANKS.search(first)
    return started, None if ranks is None else int(ranks.group(1))


def mark_done(log: Path) -> None:
    """Note at the end of a log that its attempt made the artifact, if the disk has room for that."""
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as stream:
        stream.write(f"{DONE}\n")


def is_done(log: Path) -> bool:
    """Return whether a log's attempt made the artifact."""
    return end_of_log(log, len(DONE) + 1) == f"{DONE}\n"

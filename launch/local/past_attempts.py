"""Past attempts to run stages on this machine, as known from logs, manifests and work folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from hfprune_launch.stage.stage_file import began_at, find_stage_file

from hfprune_dist.store.atomic_files import listed, modified_at
from hfprune_dist.store.attempt import Attempt
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle

# ``<kind>-<fingerprint>`` of a stage -> its logs, by attempt number.
LogsOfStages = Mapping[str, Mapping[int, Path]]

# Part of a log's first line (``local.backend``): the number of ranks among torchrun's options.
RANKS = re.compile(r"--nproc-per-node=(\d+)")


def logs_below(folder: Path) -> LogsOfStages:
    """Find the logs of all stages of a sweep in a single pass over their folder."""
    found: dict[str, dict[int, Path]] = {}
    for log in listed(folder, "*.*.log"):
        stage, *_, number, _ = log.name.split(".")
        found.setdefault(stage, {})[int(number) if number.isdecimal() else 0] = log
    return found


def past_attempts(stage: Stage, handle: StageHandle, logs: LogsOfStages) -> list[Attempt]:
    """Return the local backend's attempts at a stage, first to last.

    All that remains of an attempt followed by a later one is its log: the first line says when it began and on how
    many ranks, and the file's modification time when it ended.

    Args:
        logs: what ``logs_below`` found.
    """
    found = logs.get(f"{stage.kind}-{stage.fingerprint}", {})
    last = _made(handle) or _unfinished(handle)
    earlier = [_cut_off(number, log) for number, log in sorted(found.items()) if last is None or number < last.number]
    return [*earlier, *_with_log(last, found)]


def _cut_off(number: int, log: Path) -> Attempt:
    started, ranks = _beginning(log)
    said = "its log tells how far it came"
    return Attempt(number, "failed", started, modified_at(log), "cut off", said, logs=(log,), ranks=ranks)


def _beginning(log: Path) -> tuple[float | None, int | None]:
    """Return unix time and ranks from a log's first line, as the backend writes it; None if it is something else.

    The line begins with the time and, except in logs of earlier versions, its offset from UTC.
    """
    try:
        with log.open(encoding="utf-8", errors="replace") as stream:
            first = stream.readline()
        started = datetime.fromisoformat(" ".join(first.split(" ", 2)[:2])).timestamp()
    except (OSError, ValueError, OverflowError):
        return None, None
    ranks = RANKS.search(first)
    return started, None if ranks is None else int(ranks.group(1))


def _made(handle: StageHandle) -> Attempt | None:
    """Return the attempt that made the artifact; None if there is none."""
    manifest = handle.manifest()
    if manifest is None:
        return None
    times = manifest.get("started"), manifest.get("finished")
    return Attempt(manifest.get("attempts", 1), "done", *times, "done", ranks=manifest.get("world_size"))


def _unfinished(handle: StageHandle) -> Attempt | None:
    """Return the attempt that runs, failed, or was cut off; None if none has begun."""
    content = find_stage_file(handle)
    if content is None:
        return None
    started, failure = began_at(handle), handle.failure()
    if failure is not None:
        return Attempt(content.attempt, "failed", started, failure.at, failure.cause, failure.message)
    beat = handle.heartbeat()
    said = f"last sign of life: {beat.phase} {beat.done}/{beat.total}" if beat else ""
    return Attempt(content.attempt, "open", started, beat.updated if beat else None, "no end known", said)


def _with_log(last: Attempt | None, logs: Mapping[int, Path]) -> list[Attempt]:
    if last is None:
        return []
    log = logs.get(last.number)
    return [replace(last, logs=(log,) if log else ())]

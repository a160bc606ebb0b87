"""What is known of the attempts to run stages on this machine, from logs, manifests and work folders."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hfprune_launch.stage.stage_file import find_stage_file

from hfprune_dist.store.artifacts import STAGE_FILE
from hfprune_dist.store.attempt import Attempt
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle

# ``<kind>-<fingerprint>`` of a stage -> its logs, by the number of the attempt.
LogsOfStages = Mapping[str, Mapping[int, Path]]

# What a log begins with (``local.backend``): local time, and among torchrun's options the number of ranks.
TIME, RANKS = "%Y-%m-%d %H:%M:%S", re.compile(r"--nproc-per-node=(\d+)")


def logs_below(folder: Path) -> LogsOfStages:
    """One look at the folder of logs for all stages of a sweep."""
    found: dict[str, dict[int, Path]] = {}
    for log in folder.glob("*.*.log"):
        stage, *_, number, _ = log.name.split(".")
        found.setdefault(stage, {})[int(number) if number.isdecimal() else 0] = log
    return found


def past_attempts(stage: Stage, handle: StageHandle, logs: LogsOfStages) -> list[Attempt]:
    """Attempts of the local backend at a stage, first to last.

    Of an attempt that a later one followed, the log is all that is left: its first line tells when it began and on how
    many ranks, the time of its last when it ended.

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
    return Attempt(number, "failed", started, _modified(log), "cut off", said, logs=(log,), ranks=ranks)


def _beginning(log: Path) -> tuple[float | None, int | None]:
    """Unix time and ranks by a log's first line, as the backend writes it; None where it is something else."""
    try:
        with log.open(errors="replace") as stream:
            first = stream.readline()
        started = time.mktime(time.strptime(first[: len("2000-01-31 00:00:00")], TIME))
    except (OSError, ValueError, OverflowError):
        return None, None
    ranks = RANKS.search(first)
    return started, None if ranks is None else int(ranks.group(1))


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def _made(handle: StageHandle) -> Attempt | None:
    """The attempt that made the artifact; None where there is none."""
    manifest = handle.manifest()
    if manifest is None:
        return None
    times = manifest.get("started"), manifest.get("finished")
    return Attempt(manifest.get("attempts", 1), "done", *times, "done", ranks=manifest.get("world_size"))


def _unfinished(handle: StageHandle) -> Attempt | None:
    """The attempt that runs, failed, or was cut off; None where none has begun."""
    content = find_stage_file(handle)
    if content is None:
        return None
    started, failure = _modified(handle.work / STAGE_FILE), handle.failure()
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

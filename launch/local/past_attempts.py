"""Past attempts to run stages on this machine, as known from logs, manifests and work folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hfprune_launch.local.logs import LogsOfStages, beginning, is_done
from hfprune_launch.stage.stage_file import began_at, find_stage_file

from hfprune_dist.store.atomic_files import modified_at
from hfprune_dist.store.attempt import Attempt
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle


def past_attempts(stage: Stage, handle: StageHandle, logs: LogsOfStages) -> list[Attempt]:
    """Return the local backend's attempts at a stage, first to last.

    All that remains of an attempt followed by a later one is its log: the first line says when it began and on how
    many ranks, the last one whether it made the artifact, and the file's modification time when it ended.

    Args:
        logs: what ``logs_below`` found.
    """
    found = logs.get(f"{stage.kind}-{stage.fingerprint}", {})
    last = _made(handle) or _unfinished(handle)
    earlier = [_earlier(number, log) for number, log in sorted(found.items()) if last is None or number < last.number]
    return [*earlier, *_with_log(last, found)]


def _earlier(number: int, log: Path) -> Attempt:
    started, ranks = beginning(log)
    if is_done(log):
        said = "its artifact was lost since"
        return Attempt(number, "done", started, modified_at(log), "done", said, logs=(log,), ranks=ranks)
    said = "its log tells how far it came"
    return Attempt(number, "failed", started, modified_at(log), "cut off", said, logs=(log,), ranks=ranks)


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

"""What is known of the attempts to run stages on this machine, from logs, manifests and work folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hfprune_launch.stage.stage_file import find_stage_file

from hfprune_dist.report.evidence import Attempt
from hfprune_dist.store.artifacts import STAGE_FILE
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle


def past_attempts(stage: Stage, handle: StageHandle, logs: Path) -> list[Attempt]:
    """Attempts of the local backend at a stage, first to last.

    Of an attempt that a later one followed, the log is all that is left: it tells when it ended.

    Args:
        logs: folder of the logs.
    """
    found = sorted((_number(log), log) for log in logs.glob(f"{stage.kind}-{stage.fingerprint}.*.log"))
    last = _made(handle) or _unfinished(handle)
    earlier = [
        Attempt(number, "failed", None, _modified(log), "cut off", "its log tells how far it came", logs=(log,))
        for number, log in found
        if last is None or number < last.number
    ]
    return [*earlier, *_with_log(last, dict(found))]


def _number(log: Path) -> int:
    number = log.suffixes[-2].removeprefix(".")
    return int(number) if number.isdecimal() else 0


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
    return Attempt(manifest.get("attempts", 1), "done", manifest.get("started"), manifest.get("finished"), "done")


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


def _with_log(last: Attempt | None, logs: dict[int, Path]) -> list[Attempt]:
    if last is None:
        return []
    log = logs.get(last.number)
    return [replace(last, logs=(log,) if log else ())]

"""Measurement of time, as ratios of interleaved runs, and of memory, as the peak above what was in use before."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hfprune_dist.errors import UserError

SAMPLE_INTERVAL_S = 0.001


def paired_ratios(variants: Mapping[str, Callable[[], object]], unit: str, rounds: int) -> dict[str, float]:
    """Return the median over rounds of each variant's time over the unit's in the same round, after one warm-up round.

    Other work on the machine slows the variants of a round alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            seconds[name].append(_seconds(run))
    units = seconds[unit][1:]
    return {
        name: statistics.median(taken / one for taken, one in zip(times[1:], units, strict=True))
        for name, times in seconds.items()
    }


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory of ``run`` above what was in use before: of the GPU if there is one, else resident memory.

    Resident memory is meaningful only if freed memory goes back at once: use a process with ``isolated.TIDY``.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    _require_linux()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def peak_anonymous_bytes(run: Callable[[], object]) -> int:
    """Return the peak memory that ``run`` takes, not counting pages of files, sampled every millisecond.

    As for ``peak_bytes``, use a process with ``isolated.TIDY``.
    """
    _require_linux()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, seen, over = _status_bytes("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_INTERVAL_S):
            seen.append(_status_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        over.set()
        watcher.join()
    return max(seen) - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {key}")


def _require_linux() -> None:
    if not sys.platform.startswith("linux"):
        raise UserError("memory is measured on Linux or on a GPU only; choose other sections with --only")

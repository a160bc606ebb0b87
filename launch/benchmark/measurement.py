"""Time, as ratios of interleaved runs; memory, as the peak above what was in use before; both in fresh processes."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError

# Freed memory goes back to the system at once, so that resident memory is the memory in use.
TIDY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
ANSWER = "benchmark answer: "


def call(function: str, arguments: Mapping[str, Any], environment: Mapping[str, str], ranks: int = 1) -> Any:
    """Call ``package.module:function`` with JSON arguments in a fresh process, or on ranks of torchrun.

    Returns:
        its result, a JSON value; with several ranks, that of the first.

    Raises:
        UserError: if the process fails, with the end of its error output.
    """
    # torchrun would leave a folder for its own files behind.
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--log-dir={os.devnull}"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), __file__, function, json.dumps(arguments)]
    # A rank inherited from a job would keep a single process from answering; torchrun numbers its own.
    environment = {**os.environ, "RANK": "0", **QUIET, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    answers = [line for line in result.stdout.splitlines() if line.startswith(ANSWER)]
    if result.returncode != 0 or not answers:
        raise UserError(f"{function} failed:\n" + "\n".join(result.stderr.strip().splitlines()[-12:]))
    return json.loads(answers[0].removeprefix(ANSWER))


def paired_seconds(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round to warm up; the variants take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            _wait_for_gpu()
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def median_ratio(seconds: list[float], unit: list[float]) -> float:
    """The median over rounds of a variant's time over the unit's: other work on the machine slows both alike."""
    return statistics.median(taken / one for taken, one in zip(seconds, unit, strict=True))


def peak_bytes(run: Callable[[], object]) -> int:
    """The peak memory of ``run`` above what was in use before: of the GPU if there is one, else resident memory.

    Resident memory is meaningful only in a process with ``TIDY``.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not sys.platform.startswith("linux"):
        raise UserError("memory is measured on Linux or on a GPU only; choose other sections with --only")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _wait_for_gpu() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Run the function that ``call`` asked for, in the new process."""
    module, name = sys.argv[1].split(":")
    answer = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    if os.environ["RANK"] == "0":
        print(ANSWER + json.dumps(answer), flush=True)
    # Threads of gloo and DeepSpeed sometimes abort during the interpreter's own shutdown.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

"""Measurement in separate processes, so that none is affected by what another one left behind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
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
    result = subprocess.run(
        command,
        env={**os.environ, "RANK": "0", **QUIET, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    answers = [line for line in result.stdout.splitlines() if line.startswith(ANSWER)]
    if result.returncode != 0 or not answers:
        raise UserError(f"{function} failed:\n" + "\n".join(result.stderr.strip().splitlines()[-12:]))
    return json.loads(answers[0].removeprefix(ANSWER))


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

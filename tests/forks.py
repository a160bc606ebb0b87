"""Real ranks without the seconds that an interpreter takes to start: forks of the test's process, joined by gloo."""

from __future__ import annotations

import datetime
import gc
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError

INTERRUPTED = 75


@dataclass(frozen=True)
class Ended:
    """How ranks ended: 0, the exit code of a ``UserError``, INTERRUPTED, 1 for other errors, or minus a signal.

    Attributes:
        messages: messages of the ranks that ended with a ``UserError``.
    """

    codes: list[int]
    messages: list[str]


def on_ranks(size: int, action: Callable[[World], None]) -> Ended:
    """Run ``action`` on ``size`` ranks, each a fork with one thread, and wait for all of them.

    A rank that dies takes the others with it, as under the launcher.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = {_fork(rank, size, action, folder): rank for rank in range(size)}
        codes = [0] * size
        waiting = set(children)
        while waiting:
            child, status = os.wait()
            if child not in waiting:
                continue
            waiting.remove(child)
            codes[children[child]] = os.waitstatus_to_exitcode(status)
            if status and codes[children[child]] != INTERRUPTED:
                for other in waiting:
                    os.kill(other, signal.SIGKILL)
        return Ended(codes, [file.read_text() for file in sorted(folder.glob("message.*"))])


def _fork(rank: int, size: int, action: Callable[[World], None], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    gc.freeze()  # the parent's objects are never collected, and so stay shared with it
    try:
        torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(minutes=5),
        )
        action(World(rank, size, size, torch.device("cpu")))
        code = 0
    except Interrupted:
        code = INTERRUPTED
    except UserError as error:
        (folder / f"message.{rank}").write_text(str(error))
        code = UserError.EXIT_CODE
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

"""Run one stage on the ranks that torchrun or Slurm started; normally called by a backend, never by hand.

To run one in the foreground:  torchrun --standalone --nproc-per-node 2 launch/stage.py runs/demo/store prune/<id>
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hfprune_dist.artifacts import Store
from hfprune_dist.config import RuntimeConfig
from hfprune_dist.errors import UserError, from_os_error
from hfprune_dist.files import read_json
from hfprune_dist.parallel.interruption import Interruption
from hfprune_dist.plan import Stage
from hfprune_dist.progress import Progress, write_failure
from launch.layout import STAGE_FILE

if TYPE_CHECKING:  # torch takes seconds to import; a rank that can't run should say so at once
    from hfprune_dist.parallel.world import World


def main() -> NoReturn:
    """Run the stage; a failure is left as a file in its work folder, with a cause, before the process ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the sweep's store, e.g. runs/demo/store")
    parser.add_argument("stage", help="id of the stage, e.g. prune/0123456789abcdef0123")
    arguments = parser.parse_args()
    die_with_parent()
    prepare_environment()
    store, rank = Store(arguments.store), int(os.environ["RANK"])
    try:
        run_stage(store, arguments.stage, Interruption(), admit=lambda world: True)
    except Exception as error:
        mended = from_os_error(error)
        with contextlib.suppress(OSError):  # a full disk has no room for the reason; the launcher then finds it
            write_failure(store.work(arguments.stage), mended, rank)
        if isinstance(mended, UserError):
            print(f"error: {mended}", file=sys.stderr)
            # The other ranks may hang in a collective with this one: leave without the process group's farewell.
            leave_process(UserError.EXIT_CODE)
        raise
    leave_process(0)


def leave_process(code: int) -> NoReturn:
    """End at once, without the interpreter's farewell: in it, threads of gloo and DeepSpeed abort now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_environment() -> None:
    """Defaults of a single process where nobody started ranks, and quiet libraries."""
    single_process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in single_process.items():
        os.environ.setdefault(key, value)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def run_stage(store: Store, stage_id: str, interruption: Interruption, admit: Callable[[World], bool]) -> None:
    """Join the ranks, then hand over to ``hfprune_dist.stages.<kind>``.

    Args:
        admit: asked on every rank once all have joined; False on all of them: there is nothing to do.

    Raises:
        Interrupted: where the ranks have saved their work because ``interruption`` asked them to end.
    """
    from hfprune_dist.parallel.world import join_world, leave_world
    from hfprune_dist.stages.context import Context

    world = join_world(os.environ, _timeout_minutes(store, stage_id))
    if admit(world):
        record = read_json(store.work(stage_id) / STAGE_FILE)
        if record is None:
            raise UserError(f"{store.work(stage_id)}: no {STAGE_FILE}; stages are laid out by launch/sweep.py")
        context = Context(
            stage=Stage.to_run(record["stage"]),
            store=store,
            world=world,
            runtime=RuntimeConfig.model_validate(record["runtime"]),
            progress=Progress(store.work(stage_id) if world.is_first else None),
            config=record["config"],
            code=record["code"],
            attempt=record["attempt"],
            interruption=interruption,
        )
        context.check_inputs()
        importlib.import_module(f"hfprune_dist.stages.{context.stage.kind}").run(context)
    leave_world()


def _timeout_minutes(store: Store, stage_id: str) -> int:
    """The collective timeout; where the stage is not laid out (any more), the default."""
    record = read_json(store.work(stage_id) / STAGE_FILE)
    runtime = RuntimeConfig() if record is None else RuntimeConfig.model_validate(record["runtime"])
    return runtime.collective_timeout_minutes


def die_with_parent() -> None:
    """Ask Linux to kill this process when its launcher dies, however that one dies."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    main()

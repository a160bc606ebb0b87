"""Run one stage on ranks that a backend has started; and the file by which it tells them what to do.

To run one by hand, on a single rank:  python launch/stage/run.py runs/demo/store prune/<id>
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hfprune_dist.config.parameters import KINDS, Parameters
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.errors import UserError, from_os_error
from hfprune_dist.store.artifacts import STAGE_FILE, StageHandle, Store
from hfprune_dist.store.atomic_files import read_record, write_json
from hfprune_dist.store.attempts import End, report_failure
from hfprune_dist.store.claims import Claim, ClaimLostError, Holder
from hfprune_dist.store.heartbeat import PROGRESS, Progress
from hfprune_dist.store.machine import count_gpus
from hfprune_dist.store.stage import Stage, kind_of

if TYPE_CHECKING:  # torch takes seconds to import; a rank that can't run should say so at once
    from hfprune_dist.distributed.world import World

CLAIM_LOST_EXIT_CODE = 75  # "try again later", in sysexits.h


@dataclass(frozen=True)
class Provenance:
    """Settings and origin of a sweep's stages, as in every manifest."""

    runtime: RuntimeConfig
    config: dict[str, Any]
    code: dict[str, Any]


@dataclass(frozen=True)
class StageFile(Provenance):
    """The content of a ``stage.json``: also the stage (``Stage.to_json``) and the number of its attempt."""

    stage: dict[str, Any]
    attempt: int


def write_stage_file(handle: StageHandle, stage: Stage, provenance: Provenance, attempt: int) -> None:
    """Write what the ranks need to know, and remove the heartbeat of earlier attempts."""
    handle.work.mkdir(parents=True, exist_ok=True)
    (handle.work / PROGRESS).unlink(missing_ok=True)
    record = {"stage": stage.to_json(), "attempt": attempt, "config": provenance.config, "code": provenance.code}
    write_json(handle.work / STAGE_FILE, {**record, "runtime": provenance.runtime.model_dump()})


def find_stage_file(handle: StageHandle) -> StageFile | None:
    """Read what ``write_stage_file`` wrote; None if there is nothing that can be read."""
    return read_record(StageFile, handle.work / STAGE_FILE)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the stage. If it fails, the cause is left in the attempt's folder before the process ends."""
    store, stage_id, *token = sys.argv[1:] if argv is None else argv  # the token is that of the launcher's claim
    prepare_environment()
    handle, rank = Store(Path(store)).handle(stage_id), int(os.environ["RANK"])
    content, claim = None, Claim(handle.work, *token) if token else None
    try:
        content = find_stage_file(handle)
        if rank == 0 and claim is None:
            if isinstance(claimed := handle.claim(), Holder):
                raise UserError(f"{handle.id}: {claimed} runs it")
            claim = claimed
        run_stage(handle, Interruption(), should_run=lambda world: (True, claim))
    except ClaimLostError as lost:
        print(f"error: {lost}", file=sys.stderr)
        leave_process(CLAIM_LOST_EXIT_CODE)
    except Exception as error:
        mended = from_os_error(error)
        with contextlib.suppress(OSError):  # a full disk has no room for the reason; the launcher detects that
            if content is not None and claim is not None:  # a stage that another process runs has its own reasons
                report_failure(handle.attempts / str(content.attempt), End.of_rank(rank, mended))
        # The other ranks may wait in a collective for this one: end without waiting for them, or for threads of work.
        if isinstance(mended, UserError):
            print(f"error: {mended}", file=sys.stderr)
            leave_process(UserError.EXIT_CODE)
        sys.excepthook(type(error), error, error.__traceback__)
        leave_process(1)
    leave_process(0)


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the one that started it (``parent``, if known) dies, for whatever reason."""
    parent = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def leave_process(code: int) -> NoReturn:
    """End the process at once: threads of gloo and DeepSpeed sometimes abort during the interpreter's own shutdown."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare_environment() -> None:
    """Make a process that was not started as a rank the only rank, keep libraries quiet, idle threads asleep and freed
    memory at hand; to be called before torch is imported, as OpenMP reads its settings then.
    """
    single_process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in single_process.items():
        os.environ.setdefault(key, value)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["USE_HUB_KERNELS"] = "0"  # which transformers downloads for some architectures, unless told not to
    # Threads that spin while they wait for each other take the cores from those that work. If others use the machine
    # too, generating tokens took ten times as long; on idle cores, sleeping costs nothing that can be measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux" and not count_gpus():
        # Linux clears each page that it hands out: for most tensors, unless those up to this size keep theirs.
        for option, number in ((-3, 2**25), (-1, -1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, number)


def run_stage(
    handle: StageHandle, interruption: Interruption, should_run: Callable[[World], tuple[bool, Claim | None]]
) -> None:
    """Join the ranks, then hand over to ``hfprune_dist.stages.<kind>``. On every rank, once all have joined,
    ``should_run`` returns whether the stage has to run and, on rank 0, the claim under which it does. Raises
    ClaimLostError if another process has claimed the stage meanwhile, and Interrupted if the ranks have saved their
    work because ``interruption`` asked them to end.
    """
    with quick_imports():
        from hfprune_dist.distributed.world import join_world, leave_world
        from hfprune_dist.stages.context import Context

    content = find_stage_file(handle)  # none if another process has done the stage
    runtime = RuntimeConfig() if content is None else content.runtime
    reproducible = KINDS[kind_of(handle.id)].reproducible
    world = join_world(os.environ, runtime.collective_timeout_minutes, reproducible=reproducible)
    is_wanted, claim = should_run(world)
    if is_wanted:
        content = find_stage_file(handle)
        if content is None:
            raise UserError(f"{handle.work}: no {STAGE_FILE}; it is written by a sweep")
        context: Context[Parameters] = Context(
            stage=Stage.from_json(content.stage),
            store=handle.store,
            world=world,
            runtime=content.runtime,
            progress=Progress(handle.work if world.is_first else None, None if claim is None else claim.require_held),
            config=content.config,
            code=content.code,
            attempt=content.attempt,
            claim=claim,
            interruption=interruption,
        )
        context.check_inputs()
        with quick_imports():
            module = importlib.import_module(f"hfprune_dist.stages.{context.stage.kind}")
        try:
            module.run(context)
        except ClaimLostError:
            raise
        except Exception:
            context.require_artifacts()  # one that is gone, or damaged, is made again
            raise
    leave_world()


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Import without garbage collection, which costs a quarter of the time, and exempt the results from it later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    main()

"""The program that runs in a Slurm job, where every task of srun is one rank of the stage.

Its argument is the attempt's folder; all that it needs to know is in the store.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import psutil
from hfprune_launch.slurm.causes import START
from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.stage.run import (
    CLAIM_LOST_EXIT_CODE,
    die_with_parent,
    leave_process,
    prepare_environment,
    run_stage,
)

from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.errors import UserError, from_os_error
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.atomic_files import listed, read_json, read_record, write_json
from hfprune_dist.store.attempts import FAILURES, INTENT, Attempt, Cause, End, Intent, Run, report_failure
from hfprune_dist.store.claims import Claim, ClaimLostError, Holder, keep_renewed

if TYPE_CHECKING:
    from hfprune_dist.distributed.world import World

MEETING_POLL_S, MEETING_PATIENCE_S = 0.2, 1800.0
ANY_PORT = 9  # to which nothing is sent
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
CLAIM_POLL_S = 1.0
# A killed start of the same job has no claim of its own any more; another process holds the stage for longer.
CLAIM_PATIENCE_S = 30.0
# This many starts of a job in a row may end without getting any further.
FRUITLESS_STARTS = 3


class NodeError(UserError):
    """A node, or the part of it that the job was given, can't run the stage; another node may."""

    CAUSE = Cause.KILLED


def main(folder: Path) -> None:
    """Run this rank of the stage of an attempt, then end the process."""
    print(f"{START} {os.environ.get('SLURM_RESTART_COUNT', '0')}", file=sys.stderr, flush=True)
    interruption = Interruption()
    # USR2 announces the time limit and preemption, TERM scancel and preemption.
    interruption.listen(signal.SIGUSR2, signal.SIGTERM)
    die_with_parent()
    leave_process(run_rank(folder, interruption))


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """Return torch.distributed's environment variables for a task of srun.

    Ranks meet at the address of the node that launched the step, where srun has put the first rank; unlike the name of
    a node, an address needs no resolving. ``meet`` adds the port.
    """
    local_size = slurm.get("SLURM_STEP_TASKS_PER_NODE", "1")
    address = slurm.get("SLURM_LAUNCH_NODE_IPADDR") or slurm.get("SLURM_SRUN_COMM_HOST")
    if not address:
        raise NodeError("SLURM_LAUNCH_NODE_IPADDR is not set: the ranks can't find each other")
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": re.findall(r"\d+", local_size)[0],
        "MASTER_ADDR": address,
        GLOO_INTERFACE: slurm.get(GLOO_INTERFACE) or _interface_towards(address),
    }


def meet(folder: Path, environment: MutableMapping[str, str]) -> object:
    """Let the ranks meet at a free port, which the first one takes and publishes in the attempt's folder; return what
    has to live for as long as they do.
    """
    step = (environment.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    file, listener = folder / f"port.{'.'.join(step)}", None
    environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # that of the listener
    if environment["RANK"] == "0":
        address = environment["MASTER_ADDR"]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family, backlog=int(environment["WORLD_SIZE"]))
        write_json(file, listener.getsockname()[1])
    patience_ends = time.monotonic() + MEETING_PATIENCE_S
    while (port := read_json(file)) is None:
        if time.monotonic() > patience_ends:
            raise NodeError(f"node {socket.gethostname()} has not seen the first rank's {file} for half an hour")
        sleep(MEETING_POLL_S)
    environment["MASTER_PORT"] = str(port)
    if listener is None:
        return None
    from hfprune_dist.distributed.world import meeting_place

    return meeting_place(listener)


def _interface_towards(address: str) -> str:
    """The network interface from here to an address; on Debian, gloo's own choice is one that no other node reaches."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise NodeError(f"node {socket.gethostname()} has no route to the first rank at {address}: {error}") from None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own in [address.address for address in found]), "")


def require_usable_node(store: Store, environment: Mapping[str, str]) -> None:
    """Raise NodeError if the node does not see the store, or its GPUs."""
    node = environment.get("SLURMD_NODENAME", socket.gethostname())
    if not store.root.is_dir():
        raise NodeError(f"node {node} does not see {store.root}; --out must lie on a file system that all nodes share")
    if re.search("[1-9]", environment.get("SLURM_GPUS_ON_NODE", "")):
        import torch

        if not torch.cuda.is_available():
            told = (
                f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, can't use; check its driver, or, if"
            )
            raise NodeError(f"node {node} has GPUs that {told} it is so on all nodes, install one for an older CUDA")


def run_rank(folder: Path, interruption: Interruption) -> int:
    """Run this rank of the stage and return its exit code."""
    # <store>/attempts/<kind>/<fingerprint>/<number>
    handle = Store(folder.parents[3]).handle("/".join(folder.parts[-3:-1]))
    rank, start = int(os.environ.get("SLURM_PROCID", "0")), None

    def admit(world: World) -> tuple[bool, Claim | None]:
        """Return whether the stage has to run here: rank 0 asks, and all ranks learn the answer."""
        answer = world.broadcast(start.ask() if start else "")
        if answer == "held":
            raise ClaimLostError(f"another process has been running {handle.id} for all the time this job waited")
        return answer == "run", start.claim if start else None

    how, code = "done", 0
    try:
        os.environ.update(rank_environment(os.environ))
        prepare_environment()
        if rank == 0 and handle.store.root.is_dir():
            start = Start(handle, int(folder.name))
        require_usable_node(handle.store, os.environ)
        meeting = meet(folder, os.environ)
        run_stage(handle, interruption, admit)
        del meeting
    except Interrupted:
        if start is None:
            return 0  # other ranks' failure would end the first before it has put the job back into the queue
        start.requeue()
        return 1  # so that the batch script doesn't go on with the next stage
    except ClaimLostError as duplicate:
        print(duplicate, file=sys.stderr)
        how, code = "duplicate", CLAIM_LOST_EXIT_CODE
    except Exception as error:
        mended, claim = from_os_error(error), start.claim if start else None
        if claim is not None:
            handle.discard_draft(claim)  # on a full disk, this makes room for the reason
        how, code = "failed", UserError.EXIT_CODE if isinstance(mended, UserError) else 1
        with suppress(OSError):  # the disk may be full all the same
            report_failure(folder, End.of_rank(rank, mended))
            how = "failed" if claim is None or claim.is_held() else "duplicate"
        if not isinstance(mended, UserError):
            sys.excepthook(type(error), error, error.__traceback__)
        print(f"error: {mended}", file=sys.stderr)
    if start is not None:
        with suppress(OSError):
            start.end(how)
    return code


class Start:
    """On rank 0: decides whether the stage has to run here, which it claims then, and records this start of the job."""

    def __init__(self, handle: StageHandle, number: int) -> None:
        folder = handle.attempts / str(number)
        intent = read_record(Intent, folder / INTENT)  # by its name: NFS may list what was there a minute ago
        if intent is None:
            raise UserError(f"{handle.id}: no record of attempt {number}; jobs are submitted by a sweep")
        self.attempt = Attempt(folder, intent)
        self.claim: Claim | None = None
        self._handle = handle
        self._run = Run(
            job_id=os.environ["SLURM_JOB_ID"],
            restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
            started=time.time(),
            progress=self._progress(),
        )
        self.attempt.record_run(self._run)

    def ask(self) -> str:
        """Return ``run``, ``done`` (nothing to do) or ``held`` (another process goes on to run it)."""
        patience_ends = time.monotonic() + CLAIM_PATIENCE_S
        while isinstance(claim := self._handle.claim(self._run.job_id), Holder):
            if self._handle.is_done():
                return "done"
            if time.monotonic() > patience_ends:
                return "held"
            sleep(CLAIM_POLL_S)
        self.claim = claim
        if self._handle.is_done():
            self._handle.discard_work()
            return "done"
        for file in listed(self.attempt.folder, FAILURES):  # of earlier starts
            file.unlink(missing_ok=True)
        keep_renewed(claim)
        return "run"

    def end(self, how: str) -> None:
        """Record how this start of the job ended, and release the stage."""
        self.attempt.record_run(replace(self._run, ended=time.time(), how=how, progress=self._progress()))
        if self.claim is not None:
            self._handle.discard_draft(self.claim)
            self.claim.release()

    def requeue(self) -> None:
        """End this start, whose ranks have saved their work, and put the job back into the queue, unless Slurm itself
        does, the user has cancelled it, or its last starts got no further than those before.
        """
        self.end("interrupted")
        job_id, slurm = self._run.job_id, SlurmCommands()
        try:
            job = slurm.fields(job_id)
            if job.get("JobState") == "CANCELLED":
                self.end("cancelled")
            if job.get("JobState") != "RUNNING":
                return  # or Slurm itself puts it back
            is_preempted = job.get("PreemptTime") not in (None, "", "None", "Unknown", "N/A")
            if is_preempted or not self.gets_no_further():
                slurm.requeue(job_id)
                return
            cause = Cause.INPUT
            message = (
                f"job {job_id} was interrupted, and its last {FRUITLESS_STARTS} starts of "
                f"{self.attempt.intent.time_minutes} minutes got no further than those before; raise time_minutes "
                "or signal_seconds in the profile, or lower runtime.save_every_steps"
            )
        except SlurmUnavailableError as error:
            cause, message = Cause.INTERRUPTED, f"job {job_id} saved its work but could not requeue itself: {error}"
        report_failure(self.attempt.folder, End(cause, message, time.time(), rank=0))

    def _progress(self) -> dict[str, Any] | None:
        beat = self._handle.heartbeat()
        return None if beat is None else {"phase": beat.phase, "done": beat.done}

    def gets_no_further(self) -> bool:
        """Return whether the job's last starts, but for those that were killed, ended no further than earlier ones."""
        farthest, is_further = {"": 0}, list[bool]()  # by phase
        for end in [run.progress or {"phase": "", "done": 0} for run in self.attempt.runs() if run.ended is not None]:
            phase, done = end["phase"], end["done"]
            is_further.append(done > farthest.get(phase, -1))
            farthest[phase] = max(done, farthest.get(phase, 0))
        return len(is_further) >= FRUITLESS_STARTS and not any(is_further[-FRUITLESS_STARTS:])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import psutil
from hfprune_launch.slurm.causes import START, Cause
from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.stage.run import (
    CLAIM_LOST_EXIT_CODE,
    Admission,
    die_with_parent,
    leave_process,
    leave_reason,
    prepare_environment,
    run_stage,
)

from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.errors import UserError, from_os_error
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Ledger, Run
from hfprune_dist.store.claims import Claim, ClaimLostError, Holder, keep_renewed
from hfprune_dist.store.heartbeat import Failure

if TYPE_CHECKING:
    from hfprune_dist.distributed.world import World

FIRST_PORT, PORTS = 20000, 12000  # below the range that systems use for outgoing connections
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
CLAIM_POLL_S = 1.0
# A killed start of the same job has no claim of its own any more; another process holds the stage for longer.
CLAIM_PATIENCE_S = 30.0
# This many starts of a job in a row may end without getting any further.
FRUITLESS_STARTS = 3


class NodeError(UserError):
    """A node, or the part of it that the job was given, can't run the stage; another node may."""

    CAUSE = Cause.BAD_NODE


def main(folder: Path) -> None:
    """Run this rank of the stage, then end the process; a requeued job resumes from the stage's work folder.

    Args:
        folder: the attempt's folder in the store.
    """
    print(f"{START} {os.environ.get('SLURM_RESTART_COUNT', '0')}", file=sys.stderr, flush=True)
    interruption = Interruption()
    # USR2 announces the time limit and preemption, TERM scancel and preemption.
    interruption.listen(signal.SIGUSR2, signal.SIGTERM)
    die_with_parent()
    leave_process(_Rank(folder, interruption).run())


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """Return torch.distributed's environment variables for a task of srun.

    Ranks meet at the address of the node that launched the step, where srun has put the first rank; unlike the name of
    a node, an address needs no resolving. The port is derived from the job's id, so that all ranks know it.

    Raises:
        NodeError: if the launch node can't be found.
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
        "MASTER_PORT": str(FIRST_PORT + int(slurm["SLURM_JOB_ID"]) % PORTS),
        GLOO_INTERFACE: slurm.get(GLOO_INTERFACE) or _interface_towards(address),
    }


def _interface_towards(address: str) -> str:
    """Return the network interface of this node from which an address is reached.

    By itself, gloo takes that of the node's own name, to which Debian gives an address that no other node reaches.
    """
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, FIRST_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise NodeError(f"node {socket.gethostname()} has no route to the first rank at {address}: {error}") from None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if own in [address.address for address in found]), "")


def require_usable_node(store: Store, environment: Mapping[str, str]) -> None:
    """Check that the node sees the store and its GPUs, and runs the sweep's code.

    Raises:
        NodeError: if it does not; names the node and what it lacks.
    """
    node, code = environment.get("SLURMD_NODENAME", socket.gethostname()), environment["HFPRUNE_CODE"]
    if not store.root.is_dir():
        raise NodeError(f"node {node} does not see {store.root}; --out must lie on a file system that all nodes share")
    if not Path(__file__).is_relative_to(code):
        raise NodeError(f"node {node} runs {__file__}, not the sweep's snapshot {code}; check the profile's setup")
    if re.search("[1-9]", environment.get("SLURM_GPUS_ON_NODE", "")):
        import torch

        if not torch.cuda.is_available():
            raise NodeError(f"node {node} was allocated with GPUs, but torch finds none; check its driver")


class _Rank:
    """One rank, from its start to its end."""

    def __init__(self, folder: Path, interruption: Interruption) -> None:
        self._number = int(folder.name)
        # <store>/attempts/<kind>/<fingerprint>/<number>
        self._handle = Store(folder.parents[3]).handle("/".join(folder.parts[-3:-1]))
        self._folder = folder
        self._interruption = interruption
        self._rank = int(os.environ.get("SLURM_PROCID", "0"))
        self._start: Start | None = None  # on rank 0

    def run(self) -> int:
        """Run this rank and return its exit code."""
        try:
            os.environ.update(rank_environment(os.environ))
            prepare_environment()
            if self._rank == 0 and self._handle.store.root.is_dir():
                self._start = Start(self._folder)
            require_usable_node(self._handle.store, os.environ)
            run_stage(self._handle, self._interruption, self._admit)
        except Interrupted:
            return 0 if self._start is None or self._requeue(self._start) else 1
        except ClaimLostError as duplicate:
            print(duplicate, file=sys.stderr)
            self._end("duplicate")
            return CLAIM_LOST_EXIT_CODE
        except Exception as error:
            return self._fail(error)
        self._end("done")
        return 0

    def _admit(self, world: World) -> Admission:
        """Return whether the stage has to run here: rank 0 asks, and all ranks learn the answer."""
        answer = world.broadcast(self._start.ask() if self._start else "")
        if answer == "held":
            raise ClaimLostError(f"another process has been running {self._handle.id} for all the time this job waited")
        return Admission(answer == "run", self._claim)

    def _requeue(self, start: Start) -> bool:
        """On rank 0, once all ranks have saved their work: put the job back into the queue, unless Slurm does.

        Returns:
            False if the job is to end, because the user has cancelled it, its last starts got no further than those
            before, or Slurm did not answer.
        """
        start.end("interrupted")
        job_id, slurm = os.environ["SLURM_JOB_ID"], SlurmCommands()
        try:
            job = slurm.fields(job_id)
            if job.get("JobState") == "CANCELLED":
                start.end("cancelled")
                return False
            if job.get("JobState") != "RUNNING":
                return True  # Slurm itself puts it back
            is_preempted = job.get("PreemptTime") not in (None, "", "None", "Unknown", "N/A")
            if not is_preempted and start.gets_no_further():
                self._report(
                    Cause.INPUT,
                    f"job {job_id} was interrupted, and its last {FRUITLESS_STARTS} starts of "
                    f"{start.attempt.intent.time_minutes} minutes got no further than those before; raise time_minutes "
                    "or signal_seconds in the profile, or lower runtime.save_every_steps",
                )
                return False
            print(f"signal {self._interruption.signal}: work is saved, requeueing job {job_id}", flush=True)
            slurm.requeue(job_id)
            return True
        except SlurmUnavailableError as error:
            self._report(Cause.INTERRUPTED, f"job {job_id} saved its work but could not requeue itself: {error}")
            return False

    def _report(self, cause: Cause, message: str) -> None:
        print(message, flush=True)
        self._handle.report_failure(Failure(cause, message, 0, time.time(), self._number))

    def _fail(self, error: Exception) -> int:
        """Leave the reason for the launcher, and return the exit code."""
        mended = from_os_error(error)
        if self._claim is not None:
            self._handle.discard_draft(self._claim)  # on a full disk, this makes room for the reason
        try:
            leave_reason(self._handle, mended, self._rank, self._number, self._claim)
            self._end("failed" if self._claim is None or self._claim.is_held() else "duplicate")
        except OSError as full:
            print(f"the failure could not be recorded: {full}", file=sys.stderr)
        if not isinstance(mended, UserError):
            sys.excepthook(type(error), error, error.__traceback__)
        print(f"error: {mended}", file=sys.stderr)
        return UserError.EXIT_CODE if isinstance(mended, UserError) else 1

    @property
    def _claim(self) -> Claim | None:
        return self._start.claim if self._start is not None else None

    def _end(self, how: str) -> None:
        if self._start is not None:
            self._start.end(how)


class Start:
    """On rank 0: decides whether the stage has to run here, and keeps the record of this start of the job.

    Attributes:
        claim: claim on the stage; None until it is known that the stage has to run here.
    """

    def __init__(self, folder: Path) -> None:
        self.ledger, self.attempt = Ledger.around(folder)
        self.claim: Claim | None = None
        self._handle = self.ledger.store.handle(self.attempt.intent.stage_id)
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
        self._handle.clear_failures()
        keep_renewed(claim)
        return "run"

    def end(self, how: str) -> None:
        """Record how this start of the job ended, and release the stage."""
        self.attempt.record_run(replace(self._run, ended=time.time(), how=how, progress=self._progress()))
        if self.claim is not None:
            self._handle.discard_draft(self.claim)
            self.claim.release()

    def _progress(self) -> dict[str, Any] | None:
        beat = self._handle.heartbeat()
        return None if beat is None else {"phase": beat.phase, "done": beat.done}

    def gets_no_further(self) -> bool:
        """Return whether the job's last starts, but for those that were killed, ended where earlier ones had been."""
        progress = [run.progress for run in self.attempt.runs() if run.ended is not None]
        is_new = [at is not None and at not in progress[:number] for number, at in enumerate(progress)]
        return len(is_new) >= FRUITLESS_STARTS and not any(is_new[-FRUITLESS_STARTS:])


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The local backend: one stage at a time, on ranks of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hfprune_launch.local.warm import WarmProcess
from hfprune_launch.stage.run import Provenance, write_stage_file

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.formats import counted
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.atomic_files import unwritable
from hfprune_dist.store.attempts import Attempt, Cause, End, Ledger, end_of_log, local_log
from hfprune_dist.store.claims import Cancellation, Claim, ClaimLostError, Holder, keep_renewed
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.machine import count_gpus, cpu_model, threads_allowed, usable_cores
from hfprune_dist.store.stage import Stage

RUN = "hfprune_launch.stage.run:main"
POLL_S = 0.5  # heartbeats come no faster
CANCELLATION_POLL_S = 1.0
# Time that a cancelled launcher may take to end; it waits up to 10 s for killed ranks.
CANCELLING_S = 40.0
LOG_TAIL_LINES = 12
LOG_END_BYTES = 2**14
# Signals of a process to itself. All others come from outside: from the kernel if memory is short or a page of a mapped
# file is gone, a scheduler or a user.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

# What the driver of NVIDIA's GPUs tells about them.
NVIDIA = Path("/proc/driver/nvidia")

OnHeartbeat = Callable[[Heartbeat | None], None]


@dataclass
class LocalBackend:
    """Runs stages on this machine, on ranks that the ``warm`` process starts. The folder ``logs`` gets a log per stage
    and attempt; ``cancellation`` tells whether stages are still wanted.
    """

    store: Store
    logs: Path
    provenance: Provenance
    cancellation: Cancellation
    warm: WarmProcess

    def __post_init__(self) -> None:
        self.ranks = ranks_here(self.provenance.runtime)

    def run(self, stage: Stage, on_heartbeat: OnHeartbeat) -> End | None:
        """Claim a stage, run it on all ranks, and return why it failed; None if there is a verified artifact. Raises
        KeyboardInterrupt if another command has cancelled the sweep.
        """
        handle = self.store.handle(stage.id)
        while isinstance(claim := handle.claim(), Holder):  # another sweep works on it
            self._require_wanted()
            on_heartbeat(handle.heartbeat())
            time.sleep(POLL_S)
        try:
            self._require_wanted()
            if handle.is_done():  # another sweep was faster
                return None
            ranks = 1 if KINDS[stage.kind].on_one_rank else self.ranks
            attempt = Ledger(self.store).begin(stage, claim)
            write_stage_file(handle, stage, self.provenance, attempt.intent.number)
            return self._run(stage, ranks, attempt, claim, on_heartbeat)
        finally:
            claim.release()

    def _run(self, stage: Stage, ranks: int, attempt: Attempt, claim: Claim, on_heartbeat: OnHeartbeat) -> End | None:
        """Run a stage on all ranks, record how it ended, and return why it failed."""
        handle, log = self.store.handle(stage.id), local_log(self.logs, attempt.intent)
        # Ranks of this machine share its cores, and write their logs at once.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of_a_rank(self.provenance.runtime, ranks))}
        arguments = [str(self.store.root.resolve()), stage.id, claim.token]
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S%z')} {stage.kind} {stage.label} ({stage.id}) on "
        cause: str = Cause.INTERRUPTED
        message = "the launcher was interrupted; what was saved stays"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"{head}{counted(ranks, 'rank')}\n", encoding="utf-8")
            self.warm.start(RUN, arguments, ranks, environment, log)
            codes = self._watch(handle, claim, on_heartbeat)
            full = unwritable(self.store.root)  # which may have no room for a rank to record its own reason
            handle.discard_draft(claim)  # makes room for the end
            if handle.is_done():
                cause, message = Cause.DONE, ""
            else:
                claim.require_held()
                left = next(iter(attempt.failures()), End(Cause.INPUT, full, time.time()) if full else None)
                cause, message = explain_death(left, codes, log)
        except ClaimLostError as lost:
            cause, message = (Cause.DONE, "") if handle.is_done() else (Cause.INTERRUPTED, str(lost))
        finally:
            end = End(cause, message, time.time())
            with contextlib.suppress(OSError):  # a full disk has no room for it
                attempt.close(end)
        return None if cause == Cause.DONE else end

    def _require_wanted(self) -> None:
        if self.cancellation.is_requested():
            raise KeyboardInterrupt("cancelled by another command; run the same command again to resume")

    def _watch(self, handle: StageHandle, claim: Claim, on_heartbeat: OnHeartbeat) -> Mapping[int, int]:
        """Wait for all ranks and return their exit codes; end them if interrupted, cancelled or without the claim."""
        looked_at, _ = time.monotonic(), keep_renewed(claim)
        try:
            while (codes := self.warm.ended(POLL_S)) is None:
                on_heartbeat(handle.heartbeat())
                if time.monotonic() - looked_at > CANCELLATION_POLL_S:
                    looked_at = time.monotonic()
                    with contextlib.suppress(OSError):  # the store doesn't answer at this moment
                        self._require_wanted()
                        if not handle.is_committed():  # after which the claim goes with the work folder
                            claim.require_held()
        except BaseException:
            self.warm.close()
            handle.discard_draft(claim)
            raise
        return codes


def explain_death(left: End | None, codes: Mapping[int, int], log: Path) -> tuple[str, str]:
    """Return why an attempt failed, cause and message, from what its ranks recorded and how their processes ended.

    Args:
        left: the most informative end that the ranks recorded; None if they recorded none.
        codes: rank -> exit code, negative for a signal; empty if the process that started the ranks died with them.
        log: log of all ranks.
    """
    if left is not None and left.cause != Cause.CODE:
        return left.cause, left.message
    signals = {rank: signal.Signals(-code) for rank, code in sorted(codes.items()) if code < 0}
    is_from_outside = bool(set(signals.values()) - set(CRASHES))  # the surviving ranks then fail too, in a collective
    if left is not None and codes and not is_from_outside:
        if not left.is_consequence:
            return left.cause, left.message
        if not signals:
            return left.cause, f"a rank was lost or hangs, and rank {left.rank} waited for it:\n{left.message}"
    ends = [f"rank {rank} by {number.name}{', from outside' * is_from_outside}" for rank, number in signals.items()]
    ends = ends or [f"rank {rank} with exit code {code}" for rank, code in codes.items() if code]
    how = ", ".join(ends) or ("all ended as if they had succeeded" if codes else "all, and what started them")
    cause = Cause.CODE if signals and not is_from_outside else Cause.KILLED
    message = f"a rank died without a message: {how}"
    lines = [line for line in end_of_log(log, LOG_END_BYTES).splitlines() if line.strip()]
    ending = "\n  ".join([f"\n{log} ends with:", *lines[-LOG_TAIL_LINES:]])
    return cause, message + ending


# Cancellation of what launchers run themselves: they see the store's token, end their ranks and then themselves.


def running_without_job(plan: Plan, store: Store) -> dict[Holder, Stage]:
    """Return the launchers that run stages themselves, not in jobs of a batch system, each with its stage."""
    running, ledger = {}, Ledger(store)
    for stage in plan.stages.values():
        holder = store.handle(stage.id).holder()
        if holder and holder.lives and holder.job is None and ledger.open_job(stage.id) is None:
            running[holder] = stage
    return running


def wait_until_cancelled(plan: Plan, store: Store) -> list[str]:
    """Wait for launchers to leave their stages once a cancellation has been requested; return a message about each."""
    deadline, seen, running = time.monotonic() + CANCELLING_S, dict[Holder, Stage](), running_without_job(plan, store)
    while running and time.monotonic() < deadline:
        seen |= running
        time.sleep(POLL_S)
        running = running_without_job(plan, store)
    what = {holder: f"{stage.kind} {stage.label}: {holder}" for holder, stage in (seen | running).items()}
    return [
        f"not cancelled yet: {name} is still at work on it; on its machine, kill {holder.pid} ends it"
        if holder in running
        else f"cancelled: {name} has stopped work on it; what was saved stays, and the same command continues"
        for holder, name in what.items()
    ]


# What this machine has, without importing torch.


def device_here(runtime: RuntimeConfig) -> str:
    """Return the device of a stage with one rank: this machine's kind of GPU, or its CPU and number of threads."""
    if not count_gpus():
        return f"{cpu_model()}, threads: {threads_of_a_rank(runtime, 1)}"
    facts = "\n".join(file.read_text(encoding="utf-8") for file in NVIDIA.glob("gpus/*/information"))
    models = {model.strip() for model in re.findall("^Model:(.*)$", facts, re.MULTILINE)}
    return ", ".join(sorted(models)) or "a GPU"


def threads_of_a_rank(runtime: RuntimeConfig, ranks: int) -> int:
    """Return the CPU threads of each rank of a stage that has ``ranks`` ranks on this machine."""
    return runtime.threads_per_rank or threads_allowed(os.environ) or max(1, usable_cores() // ranks)


def ranks_here(runtime: RuntimeConfig) -> int:
    """Return the number of ranks of a stage on this machine: at most one for each GPU, if there are any."""
    gpus = count_gpus()
    return min(runtime.ranks or gpus or 1, gpus or sys.maxsize)

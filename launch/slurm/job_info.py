"""What Slurm says about a job, whichever of its commands says it."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Live, but on no node; in the last three Slurm holds a job until somebody releases or cancels it.
WAITING_STATES = frozenset({"PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
LIVE_STATES = WAITING_STATES | {
    *("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_FED", "EXPEDITING"),
}
# Why a job waits for others; and why it would wait for ever, as one of them did not succeed, if Slurm did not end it.
DEPENDENCY = "Dependency"
NEVER = "DependencyNeverSatisfied"
# What the reasons begin with of jobs that a user or an administrator holds.
HELD = "JobHeld"
# What accounting says of a job that has never started.
NO_NODES = "None assigned"


@dataclass(frozen=True)
class JobInfo:
    """Slurm's information on a job.

    Attributes:
        state: as squeue names it, e.g. RUNNING or NODE_FAIL.
        reason: why it waits or ended; "None" if there is no reason.
        nodes: its nodes in Slurm's notation, e.g. n[1-2]; empty while it waits.
    """

    job_id: str
    state: str
    reason: str
    nodes: str
    start: str
    end: str
    name: str

    @property
    def is_live(self) -> bool:
        return self.state in LIVE_STATES

    @property
    def is_waiting(self) -> bool:
        return self.state in WAITING_STATES

    def in_words_of_squeue(self) -> JobInfo:
        """Return what accounting says in the words of squeue, which keeps the reason for which a cancelled job waited.

        Accounting gives no reason, but the user who cancelled the job ("CANCELLED by 1000"). If nobody did, Slurm did.
        """
        state, *by = self.state.split(" ")
        if state != "CANCELLED" or self.nodes != NO_NODES:
            return replace(self, state=state)
        return replace(self, state=state, reason=DEPENDENCY if by else NEVER)

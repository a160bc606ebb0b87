"""What Slurm says about a job, whichever of its commands says it."""

from __future__ import annotations

from dataclasses import dataclass, replace

# Live, but on no node; in the last three Slurm holds a job until somebody releases or cancels it.
WAITING_STATES = frozenset({"PENDING", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
LIVE_STATES = WAITING_STATES | {
    *("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_FED", "EXPEDITING"),
}
# Why a job waits, and why it was ended if Slurm ends such jobs: one on which it depends did not succeed.
NEVER = "DependencyNeverSatisfied"
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

    @property
    def was_dropped(self) -> bool:
        """Whether Slurm itself cancelled it, as a job on which it depends did not succeed."""
        return self.state == "CANCELLED" and self.reason == NEVER

    def in_words_of_squeue(self) -> JobInfo:
        """Return what accounting says in the words of squeue.

        Accounting names the user who cancelled a job ("CANCELLED by 1000") but no reason; if nobody did, it was Slurm.
        """
        if self.state == "CANCELLED" and self.nodes == NO_NODES:
            return replace(self, reason=NEVER)
        return replace(self, state=self.state.split(" ")[0])

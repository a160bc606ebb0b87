"""Slurm inside this process, in place of its commands: thousands of polling rounds in seconds."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from hfprune_launch.slurm import commands
from hfprune_launch.slurm.launcher import Launcher
from hfprune_launch.slurm.profile import Profile, Resources
from hfprune_launch.stage.run import Provenance
from made_stages import being_made, stage_of

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Attempt, Ledger
from hfprune_dist.store.claims import Cancellation
from hfprune_dist.store.stage import Input, Stage

HEADER = "JOBID|STATE|REASON|NODELIST|NAME|COMMENT|;\n"
RESOURCES = dict.fromkeys(KINDS, Resources())


# A row of a sweep, whose last two stages run in one job.
SCORES = stage_of("importance", "a", {}, {"model": Input("digest", "/model")})
PRUNE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"importance": SCORES.as_input()})
EVALUATE = stage_of("evaluate", "a 0.2", {}, {"model": PRUNE.as_input()})
ROW = Cell("a 0.2", "a", 0.2, "m", "entropy", "none", (SCORES.id, PRUNE.id), EVALUATE.id)
PLAN = Plan({stage.id: stage for stage in (SCORES, PRUNE, EVALUATE)}, (ROW,), (SCORES.id,))


class Clock:
    """A clock on which time passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Job:
    """A job as the controller knows it; a forgotten one is no longer listed."""

    name: str
    state: str = "PENDING"
    reason: str = "None"
    nodes: str = ""
    shared: str = ""

    def line(self, job_id: str) -> str:
        return f"{job_id}|{self.state}|{self.reason}|{self.nodes}|{self.shared}|{self.name}"


@dataclass
class Controller:
    """The controller and its commands.

    Attributes:
        answer: what sbatch prints, with ID for the job's id.
        shown: what scontrol prints of any job; None: the truth.
        faults: command -> faults of its next calls: "" (none), "error" (no answer), "empty" or "cut" (output cut off),
            "header" (squeue lists nothing), "lost" (the submission arrives, but sbatch gets no answer), "silent" (it
            arrives, but sbatch prints no id); or the message with which a command fails.
        listings: what the next calls of squeue print; None: the truth.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    answer: str = "ID\n"
    shown: str | None = None
    faults: dict[str, list[str]] = field(default_factory=dict)
    listings: list[str | None] = field(default_factory=list)
    accounting: dict[str, str] = field(default_factory=dict)  # job id -> state; empty: there is none
    submitted: int = 0
    called: list[str] = field(default_factory=list)

    def install(self, monkeypatch) -> Controller:
        """Answer for Slurm's commands, as on a machine that has them."""
        monkeypatch.setattr(commands, "_run", self.run)
        which = shutil.which
        names = ("sbatch", "squeue", "scancel", "scontrol")
        monkeypatch.setattr(shutil, "which", lambda name, **given: name if name in names else which(name, **given))
        return self

    def calls(self, name: str = "") -> list[str]:
        return [call for call in self.called if call.startswith(name)]

    def fail_next(self, name: str, *messages: str) -> None:
        self.faults[name] = list(messages)

    def set_state(self, job_id: str, state: str, nodes: str = "n1", reason: str = "None") -> None:
        job = self.jobs[job_id]
        job.state, job.nodes, job.reason = state, nodes, reason

    def live(self) -> list[str]:
        return [job_id for job_id, job in self.jobs.items() if job.state in commands.LIVE_STATES]

    def end(self, job_id: str, state: str) -> None:
        self.jobs[job_id].state = state

    def forget(self, *job_ids: str) -> None:
        """Forget jobs, as Slurm does after MinJobAge."""
        for job_id in job_ids:
            self.jobs.pop(job_id, None)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.called.append(" ".join(command))
        planned = self.faults.get(command[0])
        fault = planned.pop(0) if planned else ""
        if fault == "error":
            fault = "Unable to contact slurm controller (connect failure)"
        if " " in fault:
            return subprocess.CompletedProcess(command, 1, "", f"{fault}\n")
        code, out, error = getattr(self, command[0])(command, fault)
        if fault in ("empty", "cut"):
            out = out[: -9 if fault == "cut" else 0]
        return subprocess.CompletedProcess(command, code, out, error)

    def sbatch(self, command: list[str], fault: str) -> tuple[int, str, str]:
        script = Path(command[-1]).read_text()
        for needed in re.findall(r"after(?:ok|any):(\d+)", script):
            if needed not in self.jobs:
                return 1, "", "sbatch: error: Batch job submission failed: Job dependency problem"
        self.submitted += 1
        job_id = str(100 + self.submitted)
        self.jobs[job_id] = Job(re.findall("--comment=(.+)", script)[0], reason="Priority")
        self.jobs[job_id].shared = re.findall("--job-name=(.+)", script)[0]
        if fault == "lost":
            return 1, "", "sbatch: error: Socket timed out on send/recv operation"
        return 0, "" if fault == "silent" else self.answer.replace("ID", job_id), ""

    def squeue(self, _: list[str], fault: str) -> tuple[int, str, str]:
        if self.listings and (listing := self.listings.pop(0)) is not None:
            return 0, listing, ""
        lines = [f"{job.line(job_id)}|;\n" for job_id, job in self.jobs.items()]
        return 0, HEADER + ("" if fault == "header" else "".join(lines)), ""

    def scontrol(self, command: list[str], _: str) -> tuple[int, str, str]:
        if command[1] == "requeue":
            return 0, "", ""
        if self.shown is not None:
            return 0, self.shown, ""
        if command[-1] == "--oneliner":
            return 0, "".join(f"JobId={job_id} Comment={job.name} \n" for job_id, job in self.jobs.items()), ""
        if command[-1] not in self.jobs:
            return 1, "", "slurm_load_jobs error: Invalid job id specified"
        job = self.jobs[command[-1]]
        told = f"JobState={job.state} Reason={job.reason} NodeList={job.nodes}"
        return 0, f"JobId={command[-1]} JobName={job.shared} {told} Comment={job.name}\n", ""

    def sacct(self, command: list[str], _: str) -> tuple[int, str, str]:
        return 0, self.accounting.get(command[4].removeprefix("--jobs="), ""), ""

    def scancel(self, command: list[str], _: str) -> tuple[int, str, str]:
        for job_id in self.live():
            if job_id in command:
                self.end(job_id, "CANCELLED")
        return 0, "", ""


class FakeLauncher(Launcher):
    """A launcher whose clock is its own, and what it has told."""

    def __init__(self, store: Store, plan: Plan, max_running=None, clock=None, delays=(1.0, 2.0)):
        self.clock, self.told = clock or Clock(), []
        settings = Provenance(RuntimeConfig(), {}, {}), Profile(RESOURCES, max_running), Cancellation(store.root)
        slurm = commands.SlurmCommands(self.clock.sleep, delays)
        super().__init__(store, plan, *settings, Path("/code"), slurm, self.told.append, self.clock)

    def step_after(self, seconds: float) -> None:
        self.clock.sleep(seconds)
        self.step()

    def go_on(self, show=lambda: None, follow=True) -> None:
        self.run(show, follow, self.clock.sleep)

    def said(self, what: str) -> list[str]:
        """Return the messages of one kind, each once."""
        return list(dict.fromkeys(event.message for event in self.told if event.what == what))


def plan_of(*stages: Stage) -> Plan:
    """Return a plan without rows in which the stages are wanted that no other one needs."""
    needed = {need for stage in stages for need in stage.needs}
    return Plan(
        {stage.id: stage for stage in stages}, (), tuple(stage.id for stage in stages if stage.id not in needed)
    )


def attempts_in(store: Store, job_name: str) -> list[Attempt]:
    """Return the attempts at stages of ``PLAN`` in one job."""
    found = (attempt for stage_id in PLAN.stages for attempt in Ledger(store).jobs_of(stage_id))
    return [attempt for attempt in found if attempt.intent.job_name == job_name]


def complete(store: Store, stage: Stage) -> None:
    with being_made(store, stage, wall_time_s=1.0) as draft:
        (draft / "result").write_text("x")

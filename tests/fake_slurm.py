"""Fake sbatch, squeue, sacct, scancel and scontrol: shell scripts that keep jobs in a file and log their calls."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SCRIPTS = {
    "sbatch": """
next_failure
name=$(sed -n 's/^#SBATCH --job-name=//p' "${@: -1}")
id=$(( $(cat last_id 2>/dev/null || echo 100) + 1 ))
echo $id >last_id
echo "$id|PENDING|Priority||N/A|N/A|$name" >>jobs
after_arrival
if [ -e answer ]; then sed "s/ID/$id/" answer; else echo $id; fi
""",
    # The file answer.<n> holds what the n-th call prints.
    "squeue": """
next_failure
calls=$(grep -c ^squeue calls)
if [ -e answer.$calls ]; then cat answer.$calls; exit; fi
echo "JOBID|STATE|REASON|NODELIST|START_TIME|END_TIME|NAME|;"
sed -n 's/..*/&|;/p' jobs 2>/dev/null || true
""",
    "sacct": "next_failure\ncat history 2>/dev/null || true\n",
    "scancel": """
next_failure
for id in "$@"; do sed -i "s/^$id|[A-Z_]*/$id|CANCELLED/" jobs 2>/dev/null || true; done
""",
    "scontrol": """
next_failure
case "$*" in
    "show config") echo "ClusterName             = fake" ;;
    "show job"*)
        if [ -e job ]; then cat job; exit; fi
        line=$(grep "^${@: -1}|" jobs 2>/dev/null) ||
            { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
        IFS='|' read -r id state reason nodes start end name <<<"$line"
        echo "JobId=$id JobName=$name JobState=$state Reason=$reason StartTime=$start EndTime=$end NodeList=$nodes"
        ;;
esac
""",
}
HEADER = "JOBID|STATE|REASON|NODELIST|START_TIME|END_TIME|NAME|;\n"
PRELUDE = """#!/bin/bash
cd {folder}
echo "${{0##*/}} $*" >>calls
# The first line of <command>.fail is the next failure's message.
next_failure() {{
    local file=${{0##*/}}.fail
    [ -s $file ] || return 0
    head -n 1 $file >&2
    sed -i 1d $file
    exit 1
}}
after_arrival() {{
    [ ! -e arrived.fail ] || {{ cat arrived.fail >&2; rm arrived.fail; exit 1; }}
}}
"""


class FakeSlurm:
    """A folder of fake commands for PATH, and control over what they do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name, body in SCRIPTS.items():
            (self.bin / name).write_text(PRELUDE.format(folder=folder) + body)
            (self.bin / name).chmod(0o755)

    def on_path(self, monkeypatch) -> FakeSlurm:
        monkeypatch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")
        return self

    def fail_next(self, name: str, *messages: str) -> None:
        (self.folder / f"{name}.fail").write_text("".join(f"{message}\n" for message in messages))

    def calls(self, name: str = "") -> list[str]:
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if line.startswith(name)]

    def answer_squeue(self, *answers: str | None) -> None:
        """Set what the next calls of squeue print; None stands for the truth."""
        for number, answer in enumerate(answers, len(self.calls("squeue")) + 1):
            if answer is not None:
                (self.folder / f"answer.{number}").write_text(answer)

    def jobs(self) -> dict[str, list[str]]:
        file = self.folder / "jobs"
        lines = file.read_text().splitlines() if file.exists() else []
        return {line.split("|")[0]: line.split("|") for line in lines}

    def set_state(self, job_id: str, state: str, nodes: str = "n1", reason: str = "None") -> None:
        jobs = self.jobs()
        jobs[job_id][1:4] = state, reason, nodes
        (self.folder / "jobs").write_text("".join("|".join(job) + "\n" for job in jobs.values()))

    def forget(self, job_id: str) -> None:
        (self.folder / "jobs").write_text("".join("|".join(j) + "\n" for i, j in self.jobs().items() if i != job_id))


class Clock:
    """A clock on which time passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Controller:
    """Slurm inside this process, in place of its commands: thousands of polling rounds in seconds.

    Attributes:
        jobs: id -> [name, state]; a forgotten job is no longer listed.
        past: what accounting keeps; None if there is no accounting.
        faults: command -> faults of its next calls: "error" (no answer), "empty" or "cut" (output cut off), "header"
            (squeue lists nothing), "lost" (the submission arrives, but sbatch gets no answer), "silent" (it arrives,
            but sbatch prints no id), "limit" (the user has too many jobs).
    """

    jobs: dict[str, list[str]] = field(default_factory=dict)
    past: dict[str, list[str]] | None = None
    faults: dict[str, list[str]] = field(default_factory=dict)
    submitted: int = 0

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        planned = self.faults.get(command[0])
        fault = planned.pop(0) if planned else ""
        code, out, error = getattr(self, command[0])(command, fault)
        if fault == "error":
            code, out, error = 1, "", "Unable to contact slurm controller (connect failure)"
        elif fault in ("empty", "cut"):
            out = out[: -9 if fault == "cut" else 0]
        return subprocess.CompletedProcess(command, code, out, error)

    def live(self) -> list[str]:
        return [job_id for job_id, (_, state) in self.jobs.items() if state in ("PENDING", "RUNNING")]

    def end(self, job_id: str, state: str) -> None:
        self.jobs[job_id][1] = state

    def forget(self, job_id: str) -> None:
        job = self.jobs.pop(job_id)
        if self.past is not None:
            self.past[job_id] = job

    def sbatch(self, command: list[str], fault: str) -> tuple[int, str, str]:
        script = Path(command[-1]).read_text()
        if fault == "error":
            return 1, "", ""
        if fault == "limit":
            return 1, "", "sbatch: error: AssocMaxSubmitJobLimit"
        for needed in re.findall(r"afterok:(\d+)", script):
            if needed not in self.jobs:
                return 1, "", "sbatch: error: Batch job submission failed: Job dependency problem"
        self.submitted += 1
        job_id = str(100 + self.submitted)
        self.jobs[job_id] = [re.findall("--job-name=(.+)", script)[0], "PENDING"]
        if fault == "lost":
            return 1, "", "sbatch: error: Socket timed out on send/recv operation"
        return 0, "" if fault == "silent" else f"{job_id}\n", ""

    def squeue(self, _: list[str], fault: str) -> tuple[int, str, str]:
        lines = [f"{job_id}|{state}|None|n1|N/A|N/A|{name}|;\n" for job_id, (name, state) in self.jobs.items()]
        return 0, HEADER + ("" if fault == "header" else "".join(lines)), ""

    def sacct(self, command: list[str], _: str) -> tuple[int, str, str]:
        if self.past is None:
            return 1, "", "Slurm accounting storage is disabled"
        found = [(i, *self.past[i]) for i in command[-1].split(",") if i in self.past]
        return 0, "".join(f"{i}|{state}|None|n1|N/A|N/A|{name}\n" for i, name, state in found), ""

    def scontrol(self, command: list[str], _: str) -> tuple[int, str, str]:
        if command[1:3] == ["show", "config"]:
            return 0, "ClusterName             = fake\n", ""
        if command[-1] not in self.jobs:
            return 1, "", "slurm_load_jobs error: Invalid job id specified"
        name, state = self.jobs[command[-1]]
        return 0, f"JobId={command[-1]} JobName={name} JobState={state} Reason=None\n", ""

    def scancel(self, command: list[str], fault: str) -> tuple[int, str, str]:
        if fault != "error":
            for job_id in self.live():
                if job_id in command or f"--jobname={self.jobs[job_id][0]}" in command:
                    self.end(job_id, "CANCELLED")
        return 0, "", ""

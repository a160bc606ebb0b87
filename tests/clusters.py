"""Local Slurm clusters for tests, and views of a sweep that runs on one."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from fork_server import EXECUTABLE, forked
from ranks import FAULTS, ROOT, surroundings
from sweeps import artifacts, command, finish, results, without_costs

from hfprune_dist.store.atomic_files import read_json

SCRIPT = ROOT / "slurm" / "cluster.sh"
# Ranks sleep before each heartbeat, so that tests have a moment in which to disturb them.
SLOWLY = {"PYTHONPATH": str(FAULTS), "SLOW_MATCH": "progress.json", "SLOW_S": "0.5"}
# Jobs of a launcher that is a fork start ranks that are forks, too, and end with the processes that Slurm knows.
FORKED_RANKS = {EXECUTABLE: str(ROOT / "tests" / "forked_rank.sh")}
# A stage's first ranks are interpreters, as a test of each kind of end has them; those that go on are forks.
FORKED_SUCCESSORS = {**FORKED_RANKS, "INTERPRETER": sys.executable, "INTERPRETED_STARTS": "1"}
CONTROL = "recover alpha dense + lora"
CONTROLS_SCORES = "evaluate alpha dense + lora"
DENSE = "evaluate alpha dense"
CELL = "alpha 0.2 surgeon-uniform-block"
PRUNE = f"prune {CELL}"
# Anything slower than this hangs: tests that run in parallel, and those of other workers, share a slow machine.
PATIENCE_S = 1800.0
ONE_CELL = ("--models", "alpha", "--ratios", "0.2", "--set", "recovery.max_steps=12")
TELLING = re.compile("requeue|preempt|respon|down|error|fail|signal|cancel|kill|limit|complete", re.IGNORECASE)
# All clusters that were started: those still running are killed together with the tests that started them.
LAUNCHERS: list[subprocess.Popen[str]] = []


class Cluster:
    """A cluster of ``slurm/cluster.sh``, by the first of its ports and each node's number of CPUs."""

    def __init__(self, folder: Path, port_base: int, cpus: int) -> None:
        self.folder = folder
        conf = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(conf), "PORT_BASE": str(port_base), "CPUS": str(cpus)}

    def run(self, action: str, *arguments: str) -> None:
        log = self.folder / "commands.log"
        with log.open("a") as stream:  # not a pipe: the daemons would hold it open
            call = [SCRIPT, action, self.folder, *arguments]
            result = subprocess.run(
                call,
                env={**surroundings(), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                check=False,
            )
        assert result.returncode == 0, log.read_text()

    def slurm(self, *arguments: str) -> str:
        """Return the output of a Slurm command, which must succeed."""
        environment = {**surroundings(), **self.environment}
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(
        self,
        config: Path,
        out: Path,
        *arguments: str,
        profile: str = "local-cluster",
        real: bool = False,
        **environment: str,
    ) -> Submitted:
        """Start a sweep on this cluster; where it is ``real``, no process is a fork of the test's server."""
        started = command(config, out, *ONE_CELL, "--profile", profile, *arguments)
        hold = {"SLOW_WHILE": str(hold_file(out))}
        whole = {**surroundings(), **self.environment, "OMP_NUM_THREADS": "1", **hold, **environment}
        return Submitted(started if real else forked(started), whole, out)

    def sweep(self, config: Path, out: Path, *arguments: str) -> str:
        """Return the output of a command that looks at a sweep or stops it."""
        return finish(config, out, *ONE_CELL, *arguments, environment=self.environment).stdout

    def pid(self, daemon: str) -> int:
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def controller_log(self) -> str:
        """Return the last lines in which the controller reports an action on jobs or nodes, or a problem."""
        lines = (self.folder / "logs" / "slurmctld.log").read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if TELLING.search(line)][-80:])

    def states(self, names: set[str]) -> dict[str, str]:
        """Return job id -> state, for jobs with these names that have not ended."""
        lines = self.slurm("squeue", "--noheader", "--format=%i|%T|%k").splitlines()
        jobs = [line.split("|") for line in lines]
        return {job_id: state for job_id, state, name in jobs if name in names}

    def partition(self, name: str, **settings: str) -> str:
        """Create a partition for the jobs of one sweep and return the profile that asks for it."""
        self.slurm(
            "scontrol", "create", f"partitionname={name}", *(f"{key}={value}" for key, value in settings.items())
        )
        return self.profile(name, partition=name)

    def profile(self, name: str, **settings: object) -> str:
        """Write the shipped profile of the test cluster with some additional settings and return the file."""
        file = self.folder / f"{name}.yaml"
        shipped = yaml.safe_load((ROOT / "slurm" / "profiles" / "local-cluster.yaml").read_text())
        file.write_text(yaml.safe_dump({**shipped, **settings}))
        return str(file)

    def kill_node(self, node: str) -> None:
        """Imitate the death of a machine: kill its slurmd, its slurmstepds and all of their processes."""
        daemon = psutil.Process(self.pid(node))
        steps = [each for each in psutil.process_iter(["name"]) if each.info["name"].startswith("slurmstepd")]
        own = [step for step in steps if self._place(step) == (self.environment["SLURM_CONF"], node)]
        victims = [daemon, *own, *(child for step in own for child in step.children(recursive=True))]
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def _place(self, step: psutil.Process) -> tuple[str | None, str] | None:
        """Return the cluster and node of a step, as its tasks know them; all clusters and nodes are this machine."""
        with suppress(psutil.NoSuchProcess):
            for process in [step, *step.children(recursive=True)]:
                # One process may have just ended; the others still know the place.
                with suppress(psutil.NoSuchProcess):
                    environment = process.environ()
                    if "SLURMD_NODENAME" in environment:
                        return environment.get("SLURM_CONF"), environment["SLURMD_NODENAME"]
        return None


class Submitted:
    """A sweep in a process of its own, such as one on a cluster, with its launcher and its files."""

    def __init__(self, launcher: list[str], environment: dict[str, str], out: Path) -> None:
        self.out = out
        self._launcher = subprocess.Popen(
            launcher, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        LAUNCHERS.append(self._launcher)

    def end(self) -> tuple[int, str]:
        """Wait for the launcher to end and return its exit code and output."""
        output, _ = self._launcher.communicate(timeout=PATIENCE_S)
        return self._launcher.returncode, output

    def kill(self) -> None:
        self._launcher.kill()
        self._launcher.wait()

    def job_at_work(self, stage: str, beats: int = 1) -> str:
        """Wait until a stage has made some progress and return its job."""
        return str(wait_for(lambda: self.is_at_work(stage, beats)))

    @contextmanager
    def held(self, *stages: str) -> Iterator[tuple[str, dict[int, psutil.Process]]]:
        """Wait until one of these stages has made some progress, let none get further, yield it and rank -> process."""
        stage = wait_for(lambda: next((stage for stage in stages if self.is_at_work(stage)), None))
        hold_file(self.out).touch()
        try:
            yield stage, rank_processes(self.out, stage)
        finally:
            hold_file(self.out).unlink()

    def is_at_work(self, stage: str, beats: int = 1) -> str | None:
        """Return the job of a stage if it has made some progress."""
        for folder in attempt_folders(self.out, stage):
            run = next(folder.glob("run.*.json"), None)
            work = self.out / "store" / "work" / folder.parent.relative_to(self.out / "store" / "attempts")
            beat = read_json(work / "progress.json")
            # Tokenizing comes first and takes almost no time.
            if run and beat and beat["done"] >= beats and not beat["phase"].startswith("tokenizing"):
                return str(read(run)["job_id"])
        return None


def hold_file(out: Path) -> Path:
    """Return the file while which exists ranks that run slowly get no further."""
    return out.parent / "hold"


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def wait_for(condition: Callable[[], Any], interval_s: float = 0.25) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(interval_s)
    return found


def label_of(out: Path, folder: Path) -> str:
    """Return ``kind label`` of the stage whose attempts or artifact are in a folder."""
    stages = read(out / "sweep.json")["stages"]
    return next(f"{s['kind']} {s['label']}" for s in stages if f"{s['kind']}/{s['fingerprint']}" in str(folder))


def attempt_folders(out: Path, stage: str = "") -> list[Path]:
    """Return the folders of all attempts in jobs, in order of creation, or of those at a stage: ``kind label``."""
    intents = {file.parent: read(file) for file in (out / "store" / "attempts").glob("*/*/*/intent.json")}
    jobs = sorted(
        (folder for folder in intents if intents[folder]["job_name"]), key=lambda folder: intents[folder]["created"]
    )
    return [folder for folder in jobs if stage in ("", label_of(out, folder))]


def causes(out: Path, stage: str = "") -> list[str]:
    """Return how the attempts ended, in order."""
    return [read(folder / "end.json")["cause"] for folder in attempt_folders(out, stage)]


def runs(out: Path, stage: str) -> list[str]:
    """Return how each start of a stage's jobs ended, in order."""
    files = [file for folder in attempt_folders(out, stage) for file in sorted(folder.glob("run.*.json"))]
    return [read(file)["how"] for file in files]


def job_names(out: Path) -> set[str]:
    return {read(folder / "intent.json")["job_name"] for folder in attempt_folders(out)}


def rank_processes(out: Path, stage: str) -> dict[int, psutil.Process]:
    """Return rank -> process, for the ranks that run a stage."""
    found = {}
    folders = {str(folder) for folder in attempt_folders(out, stage)}
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if "hfprune_launch.slurm.job" in line and folders & set(line):
                environment = process.environ()
                if "SLURM_PROCID" in environment and process.name().startswith("python"):
                    found[int(environment["SLURM_PROCID"])] = process
        except psutil.Error:
            continue
    return found


def table(out: Path) -> list[dict[str, str]]:
    return [{**without_costs(row), "checkpoint": ""} for row in results(out)]


def assert_undisturbed(cluster: Cluster, out: Path, finished: Path) -> None:
    """Check that the final table and all weights equal the undisturbed sweep's and that Slurm has no jobs left."""
    assert table(out) == table(finished)
    for kind in ("importance", "prune", "recover"):
        assert artifacts(out, kind) == artifacts(finished, kind)
    wait_for(lambda: not cluster.states(job_names(out)))
    for stage in {label_of(out, folder) for folder in attempt_folders(out)}:
        assert causes(out, stage).count("done") == 1, f"{stage} was done twice: {causes(out, stage)}"
    assert not list((out / "store" / "work").glob("*/*")), "progress of finished stages is left behind"


def done(cluster: Cluster, out: Path, finished: Path, submitted: Submitted) -> str:
    code, output = submitted.end()
    assert code == 0, output
    assert_undisturbed(cluster, out, finished)
    return output

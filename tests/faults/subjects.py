"""Commands on a store that the crash campaign runs, each repeated as a user or a launcher would repeat it."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fake_slurm import PLAN, Controller, FakeLauncher, attempts_in
from hfprune_launch import run as sweep_run
from hfprune_launch import sweep
from hfprune_launch.slurm import commands as slurm_cli
from hfprune_launch.slurm.job import Start
from hfprune_launch.stage import run as stage_script
from made_stages import being_made, stage_of
from sweeps import make_inputs, results, without_costs

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_json
from hfprune_dist.store.attempts import Attempt
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Stage

Mark = Callable[[object], None]


# Results are made of held-out text alone, and nothing is trained: one process can run DeepSpeed once.
SHORT = ["--set", "recovery.method=none", "--set", "evaluation.tasks=[]"]
# Remains of a record if ``files.write_text`` dies.
DRAFT_OF_RECORD = re.compile(r"\..+\.[0-9a-f]{8}")


class Subject(ABC):
    """A command on a folder; ``prepared`` is the result of ``prepare``."""

    prepared: Any

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, folder: Path) -> Any:
        """Make inputs, and ``folder/store`` in the state that the command expects."""
        (folder / "store").mkdir()

    @abstractmethod
    def run(self, root: Path, mark: Mark, marks: list) -> dict:
        """Run the command; its result must be the same after any crash.

        Args:
            root: a store in a state that a crash may have left.
            mark: called with everything that no crash takes back.
            marks: marks of the run that crashed.
        """

    def leftovers(self, root: Path) -> list[str]:
        """Return files that nobody will ever use or remove, except drafts of records (a few hundred bytes each)."""
        hidden = [path.relative_to(root) for path in root.rglob(".*") if not DRAFT_OF_RECORD.fullmatch(path.name)]
        work = [path.relative_to(root) for path in root.glob("**/work/**/*") if path.is_file()]
        return sorted(map(str, {*hidden, *work}))


class InProcess:
    """A warm process whose only rank is this process."""

    def begin(self) -> None:
        pass

    def start(self, main: str, arguments: list[str], size: int, environment: Mapping[str, str], log: Path) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        stage_script.leave_process = sys.exit
        with contextlib.suppress(Exception, SystemExit):  # it has left its reason behind
            stage_script.main(arguments)

    def ended(self, timeout: float) -> dict[int, int]:
        return {0: 0}

    def close(self) -> None:
        pass


# The store's own commands.


class Commit(Subject):
    """An artifact with files in nested folders, and the end of its work."""

    STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {})

    def run(self, root: Path, mark: Mark, marks: list) -> dict:
        store = Store(root)
        verdict = store.handle(self.STAGE.id).verify(thorough=True)
        assert verdict.state != "corrupt", verdict.reason
        if verdict.state == "missing":
            store.handle(self.STAGE.id).work.mkdir(parents=True, exist_ok=True)
            (store.handle(self.STAGE.id).work / "half").write_text("done")
            with being_made(store, self.STAGE) as draft:
                (draft / "below" / "deep").mkdir(parents=True)
                for name in ("a.bin", "below/b.bin", "below/deep/c.bin"):
                    (draft / name).write_text(name * 100)
        store.handle(self.STAGE.id).discard_work()
        assert store.handle(self.STAGE.id).verify(thorough=True).state == "done"
        return {
            "files": {name: entry["sha256"] for name, entry in store.handle(self.STAGE.id).manifest()["files"].items()}
        }


# Whole sweeps.

BOOKKEEPING = {".lock", "checkpoints/.lock"}


class WholeSweep(Subject):
    """The command itself, from its configuration to its tables, with stages that run in this process."""

    def prepare(self, folder: Path) -> Path:
        (folder / "store").mkdir()
        return make_inputs(folder)

    def run(self, root: Path, mark: Mark, marks: list) -> dict:
        os.environ["OMP_NUM_THREADS"] = "1"
        sweep_run.WarmProcess = InProcess
        chosen = ["--models", "alpha", "--ratios", "0.2", "--methods", "hfprune", "--ranks", "1"]
        assert sweep.main(["--config", str(self.prepared), "--out", str(root), *chosen, *SHORT]) == 0
        weights = sorted(root.glob("store/*/*/*.safetensors"))
        files = {str(file.relative_to(root)): FileHashes(None).of_file(file) for file in weights}
        named = sorted(str(path.relative_to(root)) for path in root.glob("checkpoints/*/*") if path.exists())
        rows = [without_costs(row) | {"checkpoint": row["checkpoint"].replace(str(root), "")} for row in results(root)]
        return {"files": files, "rows": rows, "checkpoints": named}

    def leftovers(self, root: Path) -> list[str]:
        return sorted({*super().leftovers(root)} - BOOKKEEPING)


# Slurm.


class SlurmSweep(Subject):
    """A sweep's jobs: submitted, run, closed. Jobs live on while the machine of the store and the launcher is down."""

    ROUNDS = 12

    def run(self, root: Path, mark: Mark, marks: list) -> dict:
        fake = copy.deepcopy(marks[-1]) if marks else Controller()
        self._mark_submissions(fake, mark)
        store = Store(root)
        for _ in range(2):  # where a launcher gives up, the user repeats the command
            for stage in PLAN.stages.values():
                if store.handle(stage.id).verify().state == "done":
                    store.handle(stage.id).discard_leftovers()
            backend = FakeLauncher(store, PLAN)
            backend.step()
            for _ in range(self.ROUNDS):
                self._refuse_twins(fake, store)
                self._run_jobs(fake, store, restart=len(marks) > 0)
                backend.step()
        assert not backend.unsubmitted(), f"stuck: {backend.unsubmitted()}"
        assert all(store.handle(stage_id).verify(thorough=True).state == "done" for stage_id in PLAN.stages)
        return {}

    def _mark_submissions(self, fake: Controller, mark: Mark) -> None:
        def marking(command):
            result = fake.run(command)
            if command[0] == "sbatch":
                mark(copy.deepcopy(fake))
            return result

        slurm_cli._run = marking

    def _refuse_twins(self, fake: Controller, store: Store) -> None:
        names = [fake.jobs[job_id].name for job_id in fake.live()]
        live = [attempt.intent.stage_id for name in names for attempt in attempts_in(store, name)]
        assert len(live) == len(set(live)), f"two jobs of one stage live: {fake.jobs}"

    def _run_jobs(self, fake: Controller, store: Store, restart: bool) -> None:
        for job_id, job in fake.jobs.items():
            attempts = attempts_in(store, job.name)
            stages = [PLAN.stages[attempt.intent.stage_id] for attempt in attempts]
            needs = {need for stage in stages for need in stage.needs} - {stage.id for stage in stages}
            if job.state == "PENDING" and all(store.handle(need).verify().state == "done" for need in needs):
                pairs = zip(stages, attempts, strict=True)
                succeeds = bool(attempts) and all(self._run_stage(store, *pair, job_id, restart) for pair in pairs)
                fake.set_state(job_id, "COMPLETED" if succeeds else "FAILED")

    def _run_stage(self, store: Store, stage: Stage, attempt: Attempt, job_id: str, restart: bool) -> bool:
        """Do what the first rank of a job does."""
        os.environ |= {"SLURM_JOB_ID": job_id, "SLURM_RESTART_COUNT": str(int(restart))}
        reception = Start(store.handle(stage.id), attempt.intent.number)
        answer = reception.ask()
        assert answer in ("run", "done"), answer
        if answer == "run":
            if read_json(store.handle(stage.id).work / "stage.json") is None:
                reception.end("failed")
                return False
            draft = store.handle(stage.id).open_draft(reception.claim)
            (draft / "result").write_text("x")
            store.handle(stage.id).commit(stage, draft, {"metrics": {}, "wall_time_s": 1.0}, claim=reception.claim)
            store.handle(stage.id).discard_work()
        reception.end("done")
        return True


def subjects() -> list[Subject]:
    """Return all subjects; the last one takes longest."""
    return [Commit("commit"), SlurmSweep("slurm"), WholeSweep("sweep")]

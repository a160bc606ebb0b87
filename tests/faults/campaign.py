"""Replays every state in which a crash may leave a run, and repeats the same command there.

python tests/faults/campaign.py REPORT DRAW SUBJECT...

REPORT is a JSON file with a report on each subject, DRAW how many states of each are replayed (0: all, an hour). After
a SUBJECT, !TEXT stands for a program that does not fsync paths with this text, which must end badly. The model of a
crash is in faults.crash, the subjects are in faults.subjects.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hfprune_launch.local.warm import import_everything

from faults.crash import Recorder, Recording, State, states_of
from faults.subjects import Subject, subjects

LINES_OF_TRACEBACK = 12


def main(file: str, draw: str, *names: str) -> None:
    import_everything()  # once, instead of in every fork
    known = {subject.name: subject for subject in subjects()}
    reports = {}
    for name in names:
        subject, _, unsynced = name.partition("!")
        with tempfile.TemporaryDirectory(prefix="hfprune-crash-") as folder:
            reports[name] = Campaign(known[subject], Path(folder), unsynced).run(int(draw))
    Path(file).write_text(json.dumps(reports, indent=1))


class Campaign:
    """Crashes of one subject's command."""

    def __init__(self, subject: Subject, folder: Path, unsynced: str) -> None:
        self._subject = subject
        self._folder = folder
        self._unsynced = unsynced

    def run(self, draw: int) -> dict:
        """Run, crash, and run again in so many drawn states, or in all if ``draw`` is 0; with an fsync left out, until
        one ends badly.
        """
        choose = random.Random(0)
        self._subject.prepared = in_fork(lambda: self._subject.prepare(self._folder))
        root = self._next_root()
        shutil.copytree(self._folder / "store", root)
        whole = self._record(root)
        if isinstance(whole, str):
            return {"run": 0, "failures": [f"without a crash: {whole}"]}
        recording, result = whole
        states = states_of(recording)
        ended = []
        for state in choose.sample(states, len(states)):
            ended.append(self._ended_badly(state, result))
            if any(ended) if self._unsynced else len(ended) == draw:
                break
        return {"run": len(ended), "failures": [told for told in ended if told]}

    def _next_root(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder)) / "store"

    def _record(self, root: Path) -> tuple[Recording, dict] | str:
        """Run the command, record what it does, and return its result, too; if it fails, return how."""

        def recorded() -> tuple[Recording, dict]:
            recorder = Recorder(root, self._unsynced)
            recorder.arm()
            result = self._subject.run(root, recorder.mark, [])
            recorder.disarm()
            return recorder.recording, result

        return in_fork(recorded)

    def _ended_badly(self, state: State, expected: dict) -> str | None:
        """Repeat the command in the state after a crash; return what is wrong with its end, or None."""
        root = self._next_root()
        state.write(root)

        def again() -> tuple[dict, list[str]]:
            return self._subject.run(root, lambda value: None, state.marks), self._subject.leftovers(root)

        ended = in_fork(again)
        shutil.rmtree(root.parent)
        if isinstance(ended, str):
            return f"{state}: {ended}"
        result, left = ended
        if result != expected:
            return f"{state}: ended with {result}, not {expected}"
        return f"{state}: left behind {left}" if left else None


def in_fork(action: Callable[[], Any]) -> Any:
    """Return an action's result from a forked process or, if it raises, the end of its traceback."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with contextlib.suppress(BaseException), os.fdopen(writer, "wb") as answer, Path(os.devnull).open("w") as quiet:
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2)
            torch.set_num_threads(1)
            os.fsync = lambda _: None  # nothing here has to survive a crash
            try:
                told = action()
            except BaseException:
                told = "".join(traceback.format_exc().splitlines(keepends=True)[-LINES_OF_TRACEBACK:])
            pickle.dump(told, answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        content = answer.read()
    _, status = os.waitpid(child, 0)
    return pickle.loads(content) if content else f"died with status {status}"


if __name__ == "__main__":
    main(*sys.argv[1:])

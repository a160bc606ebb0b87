"""A checkpoint in an engine against the same in transformers: prompts' log-probabilities, and tokens chosen greedily.

Each runs ``in_engine`` in a process of its own, by the Python of an environment that has it, so that an engine may need
other versions of torch than we do. No torch here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.engines import ENGINES, fit
from hfprune_dist.config.method import EngineName
from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import read_json, read_object, write_json

SCRIPT = Path(__file__).with_name("in_engine.py")
PROMPTS = (
    "The history of the Roman Empire begins with the city of Rome, which according to legend was founded by Romulus in "
    "753 BC. Over the following centuries the city grew from a small town on the river Tiber into the capital of an",
    "In Python, a list comprehension is a short way to create a list. It consists of brackets around an expression, "
    "which a for clause follows, and then further clauses that begin with for or if. The result is a new list of",
    "Question: What are the main differences between plants and animals? Answer: Plants make their own food from "
    "sunlight, water and air, while animals have to eat other living things. In addition, the cells of plants have",
)
NEW_TOKENS = 20
# The largest difference of log-probabilities that rounding makes in float32, in nats; and how close to one another two
# tokens must be for an engine to choose the other one.
TOLERANCE = 0.01
HEADING = "## What loads it"
# What ranks of a stage, of which this may be one, are told, and no engine should take for its own.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME")


@dataclass(frozen=True)
class Check:
    """What an engine made of a checkpoint.

    Attributes:
        against: the version of transformers.
        difference: the largest, of the prompts' log-probabilities, in nats; None if it didn't run.
        equal, tokens: how many tokens are transformers' own, up to the first that isn't, and how many there are.
        failure: why it doesn't pass; empty if it does.
    """

    engine: str
    version: str
    against: str
    date: str
    difference: float | None = None
    equal: int = 0
    tokens: int = 0
    failure: str = ""

    def line(self) -> str:
        """What it found, in one line."""
        told = f"fails: {self.failure}" if self.failure else "the same as"
        if self.difference is not None:
            told += f" transformers {self.against}: " if not self.failure else "; "
            told += f"log-probabilities within {self.difference:.1g}, {self.equal} of {self.tokens} tokens equal"
        return f"{self.version} ({self.date}) {told}"


def check(
    engine: EngineName,
    checkpoint: Path,
    python: str = sys.executable,
    exported: Path | None = None,
    tolerance: float = TOLERANCE,
) -> Check:
    """Compare a checkpoint in an engine with the same in transformers.

    Args:
        python: of an environment that has the engine.
        exported: what the engine loads in its place, made by ``hfprune export``.

    Raises:
        UserError: if there is no such checkpoint, or the engine isn't there.
    """
    config = read_object(checkpoint / "config.json")
    if config is None:
        raise UserError(f"{checkpoint}: no checkpoint, since it has no readable config.json")
    trust = {"trust_remote_code": True}
    reference = _run("transformers", sys.executable, checkpoint, PROMPTS, trust if "auto_map" in config else {})
    if "runs" not in reference:
        raise UserError(f"{checkpoint}: transformers doesn't load it: {reference['error']}")
    prompts = [run["ids"] for run in reference["runs"]]
    options = fit(engine, config).options if exported is None else trust if exported.is_dir() else {}
    found = Check(engine, engine, reference["version"].split()[-1], datetime.now(UTC).date().isoformat())
    with tempfile.TemporaryDirectory() as folder:
        try:
            loaded = exported or (_to_gguf(checkpoint, Path(folder)) if engine == "llama.cpp" else checkpoint)
        except UserError as error:  # it can't be written as GGUF
            return replace(found, failure=str(error))
        answer = _run(engine, python, loaded, prompts, options)
    if "missing" in answer:
        raise UserError(
            f"{python} has no {answer['missing']}: {python} -m pip install {ENGINES[engine].install}; or name the "
            "Python of an environment that has it (--python; in a sweep runtime.engine_pythons)"
        )
    found = replace(found, version=answer.get("version", engine))
    if "runs" not in answer:
        return replace(found, failure=answer["error"])
    return replace(found, **_compared(reference["runs"], answer["runs"], tolerance))


def _compared(wanted: Sequence[Any], runs: Sequence[Any], tolerance: float) -> dict[str, Any]:
    """Fields of a check. Where tokens part, those that follow say nothing."""
    differences, equal, margin, failure = [0.0], 0, 0.0, ""
    for one, run in zip(wanted, runs, strict=True):
        differences += [abs(mine - its) for mine, its in zip(one["log_probs"], run["log_probs"], strict=True)]
        apart = (place for place, token in enumerate(one["new"]) if [token] != run["new"][place : place + 1])
        same = next(apart, len(one["new"]))
        equal += same
        margin = max([margin, *one["margins"][same : same + 1]])
    if not all(difference <= tolerance for difference in differences):  # also of NaN
        failure = f"log-probabilities differ by more than {tolerance:g}"
    elif margin > tolerance:
        failure = f"it chooses a token that transformers has {margin:.2g} nats behind another"
    tokens = sum(len(one["new"]) for one in wanted)
    return {"difference": max(differences), "equal": equal, "tokens": tokens, "failure": failure}


def _run(engine: str, python: str, model: Path, prompts: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of an engine; an error if its process ends without one."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        told = {"model": str(model), "prompts": prompts, "new_tokens": NEW_TOKENS, "options": options}
        write_json(request, {"engine": engine, **told})
        around = {name: value for name, value in os.environ.items() if name not in OF_RANKS}
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
        try:
            ended = subprocess.run([python, str(SCRIPT), str(request), str(answer)], env=around, **quiet)
        except OSError as error:
            raise UserError(f"{python}: no Python to run {engine} with: {error.strerror}") from None
        if answer.exists():
            return dict(read_json(answer))
    said = " / ".join([line.strip() for line in ended.stderr.splitlines() if line.strip()][-2:])
    return {"version": engine, "error": f"its process ended with {ended.returncode}: {said}"}


def _to_gguf(checkpoint: Path, folder: Path) -> Path:
    from hfprune_dist.export.gguf_file import write_gguf  # torch takes seconds to import

    write_gguf(open_checkpoint(checkpoint), folder / "model.gguf", "f32")
    return folder / "model.gguf"


# Cards.


def loads_in(config: Mapping[str, Any]) -> str:
    """The section of a card that says which engines load a checkpoint with this config.json."""
    found = {name: fit(name, config) for name in ENGINES}
    lines = [f"- {name}: {'yes' if one.loads else 'no'}; {one.told}".rstrip("; ") for name, one in found.items()]
    return "\n".join([HEADING, "", *lines])


def with_line(card: str, found: Check) -> str:
    """A card with what a check found, in place of what it said of the engine."""
    told = f"- {found.engine}: {found.line()}"
    if HEADING not in card:
        return f"{card.rstrip()}\n\n{HEADING}\n\n{told}\n"
    before, _, after = card.partition(HEADING)
    section, mark, rest = after.partition("\n## ")
    section, replaced = re.subn(rf"^- {re.escape(found.engine)}: .*$", lambda _: told, section, flags=re.MULTILINE)
    section = section if replaced else f"{section.rstrip()}\n{told}\n"
    return f"{before}{HEADING}{section}{mark}{rest}"

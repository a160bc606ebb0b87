"""An engine in a process of its own, run by the Python of an environment that has it, which needs nothing of ours."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune_dist.config.method import EngineName
from hfprune_dist.errors import UserError
from hfprune_dist.export import require_gguf
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.machine import count_gpus

SCRIPT = str(Path(__file__).with_name("in_engine.py"))
# What ranks of a stage, of which this may be one, are told, and no engine should take for its own.
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME")


def require_engine(engine: EngineName, python: str) -> None:
    """Refuse a Python that isn't there, or has no such engine, and llama.cpp without what writes its files."""
    if engine == "llama.cpp":
        require_gguf()
    try:
        if not _run([python, SCRIPT, engine], stderr=subprocess.DEVNULL):
            return
        why = f"it lacks {engine}"
    except OSError as error:
        why = str(error.strerror)
    way = f"name the Python of an environment that has {engine} (--python; in a sweep runtime.engine_pythons)"
    raise UserError(f"{python}: {why}; {way}; tests/run.sh has the packages")


def ask(engine: EngineName, python: str, folder: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """What an engine answers to a request, both as in ``in_engine``, whose files are in the folder.

    Raises:
        UserError: if it can't run, which says nothing of the model.
    """
    asked, answered, log = (folder / name for name in ("request.json", "answer.json", "log"))
    write_json(asked, request)
    command = [python, SCRIPT, engine, str(asked), str(answered)]
    with log.open("w") as stream:
        code = _run(command, {"TMPDIR": str(folder)}, stdout=stream, stderr=stream)
    answer: dict[str, Any] = read_json(answered) or {"unable": f"its process ended with {code}"}
    lines = filter(str.strip, log.read_text(errors="replace").split("\n"))
    said = " / ".join([*lines][-5:])
    if "unable" in answer:
        raise UserError(f"{engine} could not run: {answer['unable']}; {said}")
    if engine == "llama.cpp" and "error" in answer:
        answer["error"] += f"; {said}"  # the cause, which its Python package doesn't pass on
    return answer


def runs_of(engine: EngineName, python: str, scratch: Path, request: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """An engine's version, and the runs that it answers; ``scratch``: where a temporary folder is made.

    Raises:
        UserError: if it can't run, or doesn't run the model.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        answer = ask(engine, python, Path(folder), request)
    if "error" in answer:
        raise UserError(f"{answer['version']} doesn't run it: {answer['error']}")
    return answer["version"], answer["runs"]


def _run(command: list[str], given: dict[str, str] | None = None, **options: Any) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in OF_RANKS} | (given or {})
    if (gpu := os.environ.get("LOCAL_RANK")) and count_gpus():  # a rank's own, as ``claim_device`` leaves it there
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[int(gpu)] if seen else gpu
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False, **options).returncode

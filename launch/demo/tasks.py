"""Two multiple-choice tasks for lm-eval that need no network, as YAML files next to their data."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from hfprune_launch.demo.text import Documented, one_line, summaries, write_jsonl

from hfprune_dist.store.atomic_files import write_text

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
    lines = (one_line(block) for document in held_out for block in document.split("\n\n"))
    words = [line.split() for line in lines if SENTENCE.fullmatch(line) and len(line.split()) >= end]
    continuations = [(" ".join(line[:CONTEXT_WORDS]), " ".join(line[CONTEXT_WORDS:end])) for line in words]
    docstrings = [(f'{signature}:\n    """', summary) for signature, summary in summaries(library, SUMMARY_WORDS)]
    # A passage continues after a space; a docstring follows its quotes directly.
    for name, pairs, delimiter in (("demo_continuation", continuations, " "), ("demo_docstring", docstrings, "")):
        write_text(folder / f"{name}.yaml", TASK.format(name=name, delimiter=delimiter))
        write_jsonl(folder / f"{name}.jsonl", multiple_choice(pairs))
    write_text(folder / "demo_data.py", LOADER)


def multiple_choice(pairs: Sequence[tuple[str, str]]) -> list[dict[str, object]]:
    """Draw documents from pairs of context and answer, with other documents' answers as wrong choices; the same ones on
    every machine.
    """
    generator = random.Random(SEED)
    documents: list[dict[str, object]] = []
    for context, answer in [pairs[index] for index in generator.sample(range(len(pairs)), DOCUMENTS)]:
        others = [other for _, other in pairs if other != answer]
        choices = [answer, *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        documents.append({"context": context, "choices": choices, "label": choices.index(answer)})
    return documents

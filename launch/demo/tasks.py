"""An offline lm-eval suite: two multiple-choice tasks and one for perplexity, as YAML files next to their data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hfprune_launch.demo.docstrings import Documented, summaries
from hfprune_launch.demo.prose import passages

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import write_text

Record = dict[str, Any]

# Sizes: an evaluation of a 135M model should take seconds on two cores, so sequences are about 17 tokens long.
DOCUMENTS = 60
CHOICES = 4
CONTEXT_WORDS = 9
CONTINUATION_WORDS = 5
SUMMARY_WORDS = range(4, 9)
PERPLEXITY_DOCUMENTS = 2
SEED = 0

# lm-eval resolves paths in `data_files` against the current folder, but a `!function` against the folder of the YAML
# file. With the latter, the suite works wherever it lies, and its content, and so its digest, contains no path.
LOADER = '''"""Loads a task's documents from the .jsonl file beside this one."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict


def load(name, **_):
    """Called by lm-eval with the task's dataset_kwargs and metadata."""
    text = Path(__file__).with_name(f"{name}.jsonl").read_text(encoding="utf-8")
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in text.split("\\n") if line]))
'''


def write_tasks(folder: Path, held_out: Sequence[str], library: Sequence[Documented]) -> dict[str, list[Record]]:
    """Write the suite's settings and loader into a folder; return each task's documents, which belong beside them."""
    suite = {
        "demo_continuation": continuation_documents(held_out),
        "demo_docstring": docstring_documents(library),
        "demo_perplexity": [{"text": text} for text in held_out[:PERPLEXITY_DOCUMENTS]],
    }
    write_text(folder / "demo_data.py", LOADER)
    for name in suite:
        settings = PERPLEXITY if name == "demo_perplexity" else MULTIPLE_CHOICE
        write_text(folder / f"{name}.yaml", task_yaml(name, settings))
    return suite


def continuation_documents(held_out: Sequence[str]) -> list[Record]:
    """Ask which words continue a passage; the wrong choices continue other passages."""
    end = CONTEXT_WORDS + CONTINUATION_WORDS
    words = [passage.split() for passage in passages(held_out, min_words=end)]
    beginnings = [" ".join(passage[:CONTEXT_WORDS]) for passage in words]
    endings = [" ".join(passage[CONTEXT_WORDS:end]) for passage in words]
    return multiple_choice("demo_continuation", beginnings, endings)


def docstring_documents(library: Sequence[Documented]) -> list[Record]:
    """Ask which summary belongs to a definition; the wrong choices are summaries of other definitions."""
    items = summaries(library, SUMMARY_WORDS)
    beginnings = [f'{item.signature}:\n    """' for item, _ in items]
    return multiple_choice("demo_docstring", beginnings, [summary for _, summary in items])


def multiple_choice(name: str, contexts: Sequence[str], answers: Sequence[str]) -> list[Record]:
    """Draw documents, each with other documents' answers as wrong choices; the same ones on every machine.

    Raises:
        UserError: if the installation has too little text.
    """
    if len(answers) < DOCUMENTS:
        raise UserError(
            f"{name}: this Python's documentation gives {len(answers)} documents, {DOCUMENTS} are needed; "
            "build the demo's assets with a full CPython installation"
        )
    generator = random.Random(SEED)
    documents = []
    for index in generator.sample(range(len(answers)), DOCUMENTS):
        others = [answer for answer in answers if answer != answers[index]]
        choices = [answers[index], *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        documents.append({"context": contexts[index], "choices": choices, "label": choices.index(answers[index])})
    return documents


MULTIPLE_CHOICE: Record = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
PERPLEXITY: Record = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [
        {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
        for metric, aggregation in (("word_perplexity", "weighted_perplexity"), ("bits_per_byte", "bits_per_byte"))
    ],
}


def task_yaml(name: str, settings: Record) -> str:
    """Return the text of an lm-eval task file; it isn't simply dumped because of its `!function` tag."""
    # A docstring follows its quotes directly; a passage continues after a space.
    delimiter = {"target_delimiter": ""} if name == "demo_docstring" else {}
    common = {"task": name, "dataset_kwargs": {"name": name}, "test_split": "test", "metadata": {"version": 1.0}}
    body = yaml.safe_dump({**common, **settings, **delimiter}, sort_keys=False)
    return f"custom_dataset: !function demo_data.load\n{body}"

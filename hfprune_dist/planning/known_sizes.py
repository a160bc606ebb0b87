"""Sizes of public data sets and of a user's files, as far as a plan can tell without tokenizing them.

A task's documents are those of the split that lm-eval evaluates, its requests the choices of each document; both are
facts of the data. Tokens per request or pair are assumptions, roughly those of Llama 2's tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.config.parameters import EvaluateParameters
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.data.formats import files_of
from hfprune_dist.errors import UserError

# Number of instruction pairs in a data set of the hub.
PAIRS = {"MBZUAI/LaMini-instruction": 2_585_615}
# Tokens per pair, some 35 of which are the template's; and bytes per token in files.
TOKENS_OF_A_PAIR, TEMPLATE, BYTES_OF_A_TOKEN = 150, 35, 4
# Bytes of a file that are read to estimate how long its records are.
BEGINNING = 2**20
LINES = (".jsonl", ".ndjson", ".csv", ".tsv")


@dataclass(frozen=True)
class Requests:
    """The requests that a task makes of a model.

    Attributes:
        each: requests per document.
        tokens: tokens per request, without examples.
    """

    documents: int
    each: float
    tokens: int

    @property
    def count(self) -> int:
        return round(self.documents * self.each)


TASKS = {
    "arc_challenge": Requests(1172, 4, 40),
    "arc_easy": Requests(2376, 4, 35),
    "boolq": Requests(3270, 2, 150),
    "crows_pairs_english": Requests(1677, 2, 20),
    "openbookqa": Requests(500, 4, 20),
    "piqa": Requests(1838, 2, 40),
    "race": Requests(1045, 4, 450),
    "social_iqa": Requests(1954, 3, 40),
    "truthfulqa_mc2": Requests(817, 7.2, 250),
    "winogrande": Requests(1267, 2, 30),
}
# For each document of any other task, if evaluation.limit says how many there are at most.
USUAL = Requests(1, 4, 128)


def requests_of(params: EvaluateParameters) -> tuple[list[Requests], list[str]]:
    """The requests of the tasks whose sizes are known, and the names of the other tasks."""
    known, unknown = [], []
    for task in params.tasks:
        asked = TASKS.get(task, USUAL)
        documents = asked.documents if task in TASKS else params.limit
        if documents is None:
            unknown.append(task)
        else:
            documents = min(documents, params.limit or documents)
            known.append(Requests(documents, asked.each, asked.tokens * (1 + (params.num_fewshot or 0))))
    return known, unknown


def packed_rows(recovery: RecoveryConfig) -> int | None:
    """Estimate how many rows the instruction pairs fill; None if the number of pairs is unknown."""
    of_hub = PAIRS.get(recovery.dataset or "") if recovery.path is None else None
    of_files = _pairs_of_files(Path(recovery.path)) if recovery.path else None
    pairs, tokens = of_files or (of_hub, TOKENS_OF_A_PAIR)
    used = min((it for it in (pairs, recovery.samples) if it), default=None)
    if used is None:
        return None
    return max(1, -(-used * min(tokens, recovery.sequence_length) // recovery.sequence_length))


def _pairs_of_files(place: Path) -> tuple[int, int] | None:
    """Number of records in files with one per line, estimated from their beginnings, and tokens per record."""
    try:
        files = files_of(place)
        if any(file.suffix.lower() not in LINES for file in files):
            return None
        beginnings = [_beginning(file) for file in files]
        size, lines, read = sum(it.stat().st_size for it in files), *_sums(beginnings)
    except (UserError, OSError):  # a record doesn't say where they lie; they vanish; this user may not read them
        return None
    if not lines:
        return None
    return max(1, round(size * lines / read)), TEMPLATE + round(read / lines / BYTES_OF_A_TOKEN)


def _beginning(file: Path) -> tuple[int, int]:
    """Lines and bytes in the first part of a file, counting only whole lines if there are any."""
    with file.open("rb") as stream:
        part = stream.read(BEGINNING)
    whole = part[: part.rfind(b"\n") + 1] or part
    return whole.count(b"\n") or bool(whole), len(whole)


def _sums(beginnings: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(lines for lines, _ in beginnings), sum(read for _, read in beginnings)

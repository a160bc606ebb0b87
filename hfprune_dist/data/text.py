"""Records from a local file or a hub data set."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError

Record = Mapping[str, Any]


def read_records(source: Mapping[str, Any], path: Path | None, seed: int) -> Iterator[Record]:
    """Yield the records of a text source.

    Args:
        source: settings of the source (``text_field``, and for a hub data set ``dataset``, ``name``, ``split``,
            ``revision``).
        path: local file that holds the text; None reads the hub data set as a stream, shuffled with ``seed``.

    Raises:
        UserError: where the file or data set can't be read.
    """
    if path is None:
        yield from _stream(source, seed)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield {source["text_field"]: _read_text(path)}


def field_of(record: Record, key: str, where: str) -> str:
    """The text in a record's field.

    Raises:
        UserError: where the field is missing or holds something else; the message lists the fields there are.
    """
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: no text in field {key!r}; the record has {', '.join(sorted(record)) or 'no fields'}")
    return value


def require_fields(source: Mapping[str, Any], path: Path, fields: Iterable[str]) -> None:
    """Check that the first record of a local file has text in some fields.

    Raises:
        UserError: where it hasn't, or can't be read.
    """
    for record in itertools.islice(read_records(source, path, seed=0), 1):
        for key in fields:
            field_of(record, key, str(path))


def _read_text(path: Path) -> str:
    with _explaining(path):
        return path.read_text(encoding="utf-8")


def _read_jsonl(path: Path) -> Iterator[Record]:
    with _explaining(path), path.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected a JSON object")
            yield record


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _stream(source: Mapping[str, Any], seed: int) -> Iterator[Record]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(
            source["dataset"], source["name"], split=source["split"], revision=source["revision"], streaming=True
        )
        yield from dataset.shuffle(seed=seed, buffer_size=10_000)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data set {source['dataset']!r} (split {source['split']!r}): {error}; give a local file with path instead"
        ) from None

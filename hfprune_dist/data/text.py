"""Texts from local files or a hub data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hfprune_dist.data.formats import Placed, Record, read_files
from hfprune_dist.errors import UserError, hub_errors

# Characters of a local source that are read before a sweep begins: most sources as a whole, in a second or two.
CHECKED_CHARACTERS = 32 * 2**20


@dataclass(frozen=True)
class Beginning:
    """The first texts of a local source.

    Attributes:
        texts: for each record, the texts in the wanted fields.
        is_all: whether they are all of the source, or all of the records that were asked for.
    """

    texts: list[tuple[str, ...]]
    is_all: bool


def read_texts(
    source: Mapping[str, Any], path: Path | None, fields: Sequence[str], seed: int, where: str
) -> Iterator[tuple[str, ...]]:
    """Yield the texts in some fields of each record.

    Args:
        source: settings of a hub data set (``dataset``, ``name``, ``split``, ``revision``).
        path: local file or folder that holds the text (see ``formats.SUPPORTED``); None reads the hub data set as a
            stream, shuffled with ``seed``.
        where: what the text is for, for messages.

    Raises:
        UserError: if the text can't be read, has no records, or a record has no text in one of the fields.
    """
    records = _stream(source, seed) if path is None else read_files(path, fields)
    is_empty = True
    for place, record in records:
        is_empty = False
        yield tuple(field_of(record, field, f"{where} {place}") for field in fields)
    if is_empty:
        raise UserError(f"{where} {path or source['dataset']}: it has no records")


def read_beginning(path: Path, fields: Sequence[str], where: str, records: int | None = None) -> Beginning:
    """Read a local source as ``read_texts`` does, but stop after ``CHECKED_CHARACTERS`` or after ``records`` records.

    Raises:
        UserError: as ``read_texts``, for what is read.
    """
    texts: list[tuple[str, ...]] = []
    characters = 0
    for text in islice(read_texts({}, path, fields, 0, where), records):
        texts.append(text)
        characters += sum(map(len, text))
        if characters > CHECKED_CHARACTERS:
            return Beginning(texts, is_all=False)
    return Beginning(texts, is_all=True)


def field_of(record: Record, key: str, where: str) -> str:
    """The text in a record's field.

    Raises:
        UserError: if the field is missing, where the message lists the fields there are, or if it holds no text.
    """
    value = record.get(key)
    if not isinstance(value, str):
        found = f"field {key!r} holds {value!r:.40}" if key in record else f"the record has {', '.join(sorted(record))}"
        raise UserError(f"{where}: no text in field {key!r}; {found:.400}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: field {key!r} holds half of a surrogate pair, which is no character") from None
    return value


def require_data_set(source: Mapping[str, Any]) -> None:
    """Check that a data set is on the hub, or in its cache; none of it is read.

    Raises:
        UserError: if it isn't, or the hub can't be reached.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(source["dataset"], revision=source["revision"], timeout=10.0)
    except hub_errors():  # it may be in the cache; otherwise the message is the one that a stage would have
        with _explaining(source):
            _open(source)


def _stream(source: Mapping[str, Any], seed: int) -> Iterator[Placed]:
    with _explaining(source):
        for number, record in enumerate(_open(source).shuffle(seed=seed, buffer_size=10_000), start=1):
            yield f"{source['dataset']}, record {number}", record


def _open(source: Mapping[str, Any]) -> Any:
    from datasets import load_dataset

    parts = {name: source[name] for name in ("name", "split", "revision")}
    return load_dataset(source["dataset"], **parts, streaming=True)


@contextmanager
def _explaining(source: Mapping[str, Any]) -> Iterator[None]:
    refusals: tuple[type[Exception], ...] = (*hub_errors(), RuntimeError)
    try:
        yield
    except refusals as error:
        raise UserError(
            f"data set {source['dataset']!r} (split {source['split']!r}): {error}; give a local file with path instead"
        ) from None

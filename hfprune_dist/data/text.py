"""Records from local files or a hub data set, each with its place for messages.

The datasets library reads the hub, but not local files: it guesses the types of columns, so that the text ``1`` of a
table becomes a number and ``NA`` nothing, knows no line numbers, and takes each rank seconds to import.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest import mock

from hfprune_dist.checkpoints.weight_files import refuse_pointer
from hfprune_dist.errors import UserError, hub_errors
from hfprune_dist.store.hashing import FileHashes, digest_of

# Characters of a local source that are read before a sweep begins: most sources as a whole, in a second or two.
CHECKED_CHARACTERS = 32 * 2**20
SUPPORTED = (
    "supported are .jsonl and .ndjson (one JSON object a line), .json (an array of objects), .csv and .tsv (the first "
    "line names the fields), .parquet, and any other UTF-8 text (one document); all but .parquet also compressed (.gz, "
    ".bz2, .xz, .zst); or a folder of such files"
)
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (".jsonl", ".ndjson", ".json", *_SEPARATORS, ".parquet", ".txt")
_LONGEST_FIELD = 2**31 - 1  # in a csv file; the csv module's default, 131,072 characters, is less than a document

T = TypeVar("T")
Placed = tuple[str, Mapping[str, Any]]


def _open_zstandard(file: Path) -> io.BufferedReader:
    import pyarrow  # type: ignore[import-untyped]

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda file: file.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


@dataclass(frozen=True)
class Beginning(Generic[T]):
    """The first records of a local source; and whether they are all of it, or all that were asked for."""

    records: list[T]
    is_all: bool


def files_of(path: Path) -> list[Path]:
    """A path's files: itself or, in order, a folder's that end as ``SUPPORTED`` says. Pipes are refused."""
    with _explaining(path):
        path.stat()
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder")
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    named = [file for file in files if _format_of(file)[0]]
    if not named:
        raise UserError(f"{path}: this folder has no file that ends in {', '.join(_ENDINGS)}; {SUPPORTED}")
    return named


def identity_of(path: Path, hashes: FileHashes) -> str:
    """The identity of a local text in fingerprints: its files' content and how it is read, but not their names."""
    return digest_of([[*_format_of(file), hashes.of_file(file)] for file in files_of(path)])


def _format_of(file: Path) -> tuple[str, str]:
    """The endings of the name that tell the format, empty for an unknown one, and the compression; in lower case."""
    compression = file.suffix.lower() if file.suffix.lower() in _OPENERS else ""
    ending = Path(file.stem if compression else file.name).suffix.lower()
    return ending if ending in _ENDINGS else "", compression


def read_records(
    source: Mapping[str, Any], path: Path | None, fields: Sequence[str], seed: int, where: str
) -> Iterator[Placed]:
    """Yield records, with their places for messages; raises UserError if they can't be read, or there are none.

    Args:
        source: settings of a hub data set (``dataset``, ``name``, ``split``, ``revision``).
        path: local file or folder that holds the records; None reads the hub data set as a stream, shuffled with
            ``seed``.
        fields: those that are wanted. Plain text has a single field, the only one of these.
        where: what the records are for, for messages.
    """
    is_empty = True
    for place, record in _stream(source, seed) if path is None else _read_files(path, fields):
        is_empty = False
        yield f"{where} {place}", record
    if is_empty:
        raise UserError(f"{where} {path or source['dataset']}: it has no records")


def read_texts(source: Mapping[str, Any], path: Path | None, field: str, seed: int, where: str) -> Iterator[str]:
    """Yield the text in a field of each record, or raise UserError if it has none; arguments as of ``read_records``."""
    records = read_records(source, path, [field], seed, where)
    return (text_in(record, field, f"{place} (see text_field)") for place, record in records)


def read_beginning(items: Iterable[T], records: int | None = None) -> Beginning[T]:
    """The first of some texts or examples: so many records, or as many as have ``CHECKED_CHARACTERS``."""
    first: list[T] = []
    characters = 0
    for item in islice(items, records):
        first.append(item)
        characters += len(item if isinstance(item, str) else str(item))
        if characters > CHECKED_CHARACTERS:
            return Beginning(first, is_all=False)
    return Beginning(first, is_all=True)


def text_in(record: Mapping[str, Any], field: str, where: str) -> str:
    """The text in a field of a record, which has to be there."""
    value = record.get(field)
    if not isinstance(value, str):
        there = f"field {field!r} holds {value!r:.40}" if field in record else f"the record has {', '.join(record)}"
        raise UserError(f"{where}: no text in field {field!r}; {there:.400}")
    with _explaining(where):
        value.encode()  # half of a surrogate pair is no character
    return value


def _read_files(path: Path, fields: Sequence[str]) -> Iterator[Placed]:
    """Yield the records of a local file, or of a folder's files."""
    for file in files_of(path):
        with _explaining(file):
            refuse_pointer(file)
            ending, compression = _format_of(file)
            if ending == ".parquet":
                yield from _read_parquet(file, fields)
                continue
            line_ends = "" if ending in _SEPARATORS else None  # which are part of a table's texts
            with io.TextIOWrapper(_OPENERS[compression](file), encoding="utf-8-sig", newline=line_ends) as stream:
                if ending in _SEPARATORS:
                    yield from _read_table(file, stream, _SEPARATORS[ending])
                elif ending in (".jsonl", ".ndjson", ".json"):
                    yield from _read_json(file, stream, ending)
                else:
                    text = stream.read()
                    if "\0" in text or len(fields) > 1:
                        raise UserError(
                            f"{file}: is not plain text, or has no fields ({', '.join(fields)}); {SUPPORTED}"
                        )
                    yield str(file), {fields[0]: text}


def _read_json(file: Path, stream: io.TextIOWrapper, ending: str) -> Iterator[Placed]:
    """Read an object a line or, in a file that ends in .json, an array of objects."""
    text = stream.read() if ending == ".json" else ""
    records: Iterator[tuple[str, Any]]
    if is_array := text.lstrip().startswith("["):
        records = ((f"{file}, record {number}", record) for number, record in enumerate(json.loads(text), start=1))
    else:
        lines = enumerate(io.StringIO(text) if text else stream, start=1)
        records = ((f"{file}:{number}", line) for number, line in lines if line.strip())
    for place, record in records:
        with _explaining(place):
            value = record if is_array else json.loads(record)
        if not isinstance(value, dict):
            raise UserError(f"{place}: expected a JSON object")
        yield place, value


def _read_table(file: Path, stream: io.TextIOWrapper, separator: str) -> Iterator[Placed]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(stream, delimiter=separator, strict=True)
    names = next(rows, [])
    for row in filter(None, rows):
        if len(row) != len(names):
            raise UserError(f"{file}:{rows.line_num}: {len(row)} fields, but the first line names {len(names)}")
        yield f"{file}:{rows.line_num}", dict(zip(names, row, strict=True))


def _read_parquet(file: Path, fields: Sequence[str]) -> Iterator[Placed]:
    """Yield the rows of a Parquet file, of which only the columns that are wanted are read, if there are any."""
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        wanted = [name for name in names if name in fields]
        batches = table.iter_batches(batch_size=1024, columns=wanted or names)
        for number, record in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"{file}, row {number}", dict.fromkeys(names) | record


@contextmanager
def _explaining(where: Path | str) -> Iterator[None]:
    """Refuse what can't be read; pyarrow's errors are among the built-in ones."""
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, csv.Error, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{where}: {error.strerror}") from None
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{where}: it can't be read ({why}); is it damaged or cut short? {SUPPORTED}") from None


def require_data_set(source: Mapping[str, Any]) -> None:
    """Refuse a data set that is neither on the hub, which must be reached, nor in its cache; none of it is read."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    is_offline = constants.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(source["dataset"], revision=source["revision"], timeout=10.0)
        if source["split"] is None:
            return  # a task's, which opens it in its own way
    except hub_errors() as error:  # it may be in the cache; otherwise the message is the one that a stage would have
        # Where the hub does not answer at all, its client would ask again for half a minute.
        is_offline = is_offline or not isinstance(error, HfHubHTTPError)
    with mock.patch.object(constants, "HF_HUB_OFFLINE", is_offline), _explaining_hub(source):
        _open(source)


def _stream(source: Mapping[str, Any], seed: int) -> Iterator[Placed]:
    with _explaining_hub(source):
        for number, record in enumerate(_open(source).shuffle(seed=seed, buffer_size=10_000), start=1):
            yield f"{source['dataset']}, record {number}", record


def _open(source: Mapping[str, Any]) -> Any:
    from datasets import load_dataset

    parts = {name: source[name] for name in ("name", "split", "revision")}
    return load_dataset(source["dataset"], **parts, streaming=True)


@contextmanager
def _explaining_hub(source: Mapping[str, Any]) -> Iterator[None]:
    refusals: tuple[type[Exception], ...] = (*hub_errors(), RuntimeError)
    try:
        yield
    except refusals as error:
        told = f"{error}; check its name and split, or give a local file with path"
        raise UserError(f"data set {source['dataset']!r} (split {source['split']!r}): {told}") from None

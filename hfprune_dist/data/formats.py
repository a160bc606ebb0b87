"""The formats of local text files, and readers of the records in them, each with its place for messages.

The datasets library isn't asked: it guesses the types of columns, so that the text ``1`` of a table becomes a number
and ``NA`` nothing, knows no line numbers, and takes each rank seconds to import.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hfprune_dist.checkpoints.weight_files import refuse_pointer
from hfprune_dist.errors import UserError
from hfprune_dist.store.hashing import FileHashes, digest_of

Record = Mapping[str, Any]
Placed = tuple[str, Record]

SUPPORTED = (
    "supported are .jsonl and .ndjson (one JSON object a line), .json (an array of objects), .csv and .tsv (the first "
    "line names the fields), .parquet, and any other UTF-8 text (one document); all but .parquet also compressed (.gz, "
    ".bz2, .xz, .zst); or a folder of such files"
)
PLAIN = ".txt"
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", PLAIN)
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_LONGEST_FIELD = 2**31 - 1  # in a csv file; the csv module's default, 131,072 characters, is less than a document


def _open_zstandard(file: Path) -> BinaryIO:
    import pyarrow  # type: ignore[import-untyped]

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda file: file.open("rb"),
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def files_of(path: Path) -> list[Path]:
    """The files that a path stands for: itself or, in order, a folder's files that end as ``SUPPORTED`` says.

    Raises:
        UserError: if there are none, and for pipes and devices, which can't be read twice.
    """
    with _explaining(path):
        path.stat()
        if path.is_file():
            return [path]
        if not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder")
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    if arrow := next((file for file in files if file.suffix == ".arrow"), None):
        raise UserError(f"{arrow}: a data set as save_to_disk writes it; write it as .parquet; {SUPPORTED}")
    named = [file for file in files if _format_of(file)[0] in _ENDINGS]
    if not named:
        raise UserError(f"{path}: this folder has no file that ends in {', '.join(_ENDINGS)}; {SUPPORTED}")
    return named


def identity_of(path: Path, hashes: FileHashes) -> str:
    """The identity of a local text in fingerprints: its files' content and how it is read, but not their names.

    Raises:
        UserError: if a file can't be read.
    """
    return digest_of([[*_way_of_reading(file), hashes.of_file(file)] for file in files_of(path)])


def _way_of_reading(file: Path) -> tuple[str, str]:
    ending, compression = _format_of(file)
    return ending if ending in _ENDINGS else PLAIN, compression


def _format_of(file: Path) -> tuple[str, str]:
    """The endings of the name that tell the format and the compression, in lower case."""
    compression = file.suffix.lower() if file.suffix.lower() in _OPENERS else ""
    return Path(file.stem if compression else file.name).suffix.lower(), compression


def read_files(path: Path, fields: Sequence[str]) -> Iterator[Placed]:
    """Yield the records of a local file, or of a folder's files, each with its place.

    Args:
        fields: names of the fields that are wanted. Plain text has a single field, the first of these.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    for file in files_of(path):
        with _explaining(file):
            yield from _read(file, fields)


def _read(file: Path, fields: Sequence[str]) -> Iterator[Placed]:
    refuse_pointer(file)
    ending, compression = _way_of_reading(file)
    if ending == ".parquet":
        yield from _read_parquet(file, fields)
        return
    line_ends = "" if ending in _SEPARATORS else None  # which are part of a table's texts
    with io.TextIOWrapper(_OPENERS[compression](file), encoding="utf-8-sig", newline=line_ends) as stream:
        if ending in _SEPARATORS:
            yield from _read_table(file, stream, _SEPARATORS[ending])
        elif ending == PLAIN:
            text = stream.read()
            if "\0" in text or len(fields) > 1:
                raise UserError(f"{file}: is no plain text, or has no fields {' and '.join(fields)}; {SUPPORTED}")
            yield str(file), {fields[0]: text}
        elif ending == ".json":
            yield from _read_json(file, stream.read())
        else:
            yield from _read_lines(file, stream)


def _read_lines(file: Path, lines: Iterator[str]) -> Iterator[Placed]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                yield where, _object(json.loads(line), where)
            except (ValueError, RecursionError) as error:
                cut = "" if line.endswith("\n") else "; is the file cut short?"
                raise UserError(f"{where}: not valid JSON ({error}){cut}") from None


def _read_json(file: Path, text: str) -> Iterator[Placed]:
    """Read an array of objects, an object alone, or, as some name them so, an object a line."""
    try:
        content = json.loads(text or "[]")
    except (ValueError, RecursionError) as error:
        if not str(error).startswith("Extra data"):
            raise UserError(f"{file}: not valid JSON ({error}); is the file cut short?") from None
        yield from _read_lines(file, io.StringIO(text))
        return
    for number, record in enumerate(content if isinstance(content, list) else [content], start=1):
        where = f"{file}, record {number}"
        yield where, _object(record, where)


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object")
    return value


def _read_table(file: Path, stream: Iterator[str], separator: str) -> Iterator[Placed]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(stream, delimiter=separator, strict=True)
    names = next(rows, [])
    if len(set(names)) < len(names):
        raise UserError(f"{file}: a field appears twice in the first line, which must name the fields")
    for row in filter(None, rows):
        where = f"{file}:{rows.line_num}"
        if len(row) != len(names):
            raise UserError(f"{where}: {len(row)} fields, but the first line names {len(names)}")
        yield where, dict(zip(names, row, strict=True))


def _read_parquet(file: Path, fields: Sequence[str]) -> Iterator[Placed]:
    """Yield the rows of a Parquet file; columns that aren't wanted are named in them, but not read."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [field for field in fields if field in names]
            unread = dict.fromkeys(names) if len(columns) < len(fields) else {}
            batches = table.iter_batches(batch_size=1024, columns=columns)
            for number, record in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                yield f"{file}, row {number}", unread | record
    except (ArrowException, OverflowError, KeyError, ValueError) as error:
        raise UserError(f"{file}: not a Parquet file of texts ({' '.join(str(error).split())})") from None


@contextmanager
def _explaining(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}); {SUPPORTED}") from None
    except csv.Error as error:
        raise UserError(f"{file}: not valid CSV ({error})") from None
    except EOFError:
        raise UserError(f"{file}: its compressed data ends early; is the file cut short?") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from None

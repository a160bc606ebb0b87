"""The formats of local text files, and readers of the records in them.

Records are read one at a time, each with its place (file and line or number), so that a message can name it.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from hfprune_dist.checkpoints.lfs_pointers import refuse_pointer
from hfprune_dist.errors import UserError
from hfprune_dist.store.hashing import AfterEach, FileHashes, digest_of, nothing

Record = Mapping[str, Any]
Placed = tuple[str, Record]

SUPPORTED = (
    "supported are .jsonl and .ndjson (one JSON object a line), .json (an array of objects, or one object after "
    "another), .csv and .tsv (the first line names the fields), .parquet, and any other UTF-8 text (one document); all "
    "but .parquet also compressed (.gz, .bz2, .xz, .zst); or a folder of such files"
)
PLAIN = "plain text"
# Begins a file that some editors save as UTF-8; it isn't part of the text.
_BOM = codecs.BOM_UTF8.decode()
_BY_ENDING = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": PLAIN,
}
_REFUSED = {
    ".arrow": "Arrow files aren't read; write the data set as .parquet (datasets.load_from_disk(...).to_parquet(...))",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "archives aren't read; unpack it"),
}
# First bytes of files of other kinds, for messages about a file that isn't the text that its name promises.
_SIGNATURES = {
    b"\x1f\x8b": "it looks like gzip, whose names end in .gz",
    b"BZh": "it looks like bzip2, whose names end in .bz2",
    b"\xfd7zXZ": "it looks like xz, whose names end in .xz",
    b"\x28\xb5\x2f\xfd": "it looks like Zstandard, whose names end in .zst",
    b"PAR1": "it looks like Parquet, whose names end in .parquet",
    codecs.BOM_UTF16_LE: "it looks like UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "it looks like UTF-16; save it as UTF-8",
}
_LONGEST_FIELD = 2**31 - 1  # in a csv file; the csv module's default, 131,072 characters, is less than a document
_CHUNK_CHARACTERS = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


def files_of(path: Path) -> list[Path]:
    """The files that a path stands for: itself or, in order, a folder's files that end as ``SUPPORTED`` says.

    Files without such an ending (a README) and subfolders are left out.

    Raises:
        UserError: if there are none, and for pipes and devices, which can't be read twice.
    """
    with _explaining(path):
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return [path]
        if not stat.S_ISDIR(mode):
            raise UserError(f"{path}: neither a file nor a folder")
        files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    named = [file for file in files if _ending(file) in _BY_ENDING or _ending(file) in _REFUSED]
    if not named:
        raise UserError(f"{path}: this folder has no file that ends in {', '.join(_BY_ENDING)}; {SUPPORTED}")
    return named


def is_plain_text(path: Path) -> bool:
    """Whether a local text has no records, and so no fields.

    Raises:
        UserError: if there are no files.
    """
    return all(_format_of(file)[0] == PLAIN for file in files_of(path))


def identity_of(path: Path, hashes: FileHashes, after_each: AfterEach = nothing) -> str:
    """The identity of a local text in fingerprints: its files' content and how it is read, but not their names.

    Args:
        after_each: called after each piece of a file that is read.

    Raises:
        UserError: if a file can't be read.
    """
    files = files_of(path)
    if files == [path] and (path.suffix == ".jsonl" or _is_nothing_but_plain(path)):
        return hashes.of_file(path, after_each)  # only that, as before there were other formats
    return digest_of([[*_way_of_reading(file), hashes.of_file(file, after_each)] for file in files])


def _is_nothing_but_plain(file: Path) -> bool:
    """Whether a file is plain text that can't be read as .jsonl too; the same bytes as .jsonl are another text."""
    if _way_of_reading(file) != [PLAIN, ""]:
        return False
    with _explaining(file), file.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
    try:
        return not (first.lstrip().startswith(b"{") and isinstance(json.loads(first), dict))
    except (ValueError, RecursionError):
        return True


def _way_of_reading(file: Path) -> list[str]:
    """Format and compression, and that plain text is read without its mark, which was once read as a part of it."""
    kind, compression = _format_of(file)
    is_marked = False
    if kind == PLAIN:
        with _explaining(file):
            refuse_pointer(file)
            with _OPENERS[compression](file) as stream:
                is_marked = stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    return [kind, compression, *(["without mark"] if is_marked else [])]


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
    if _ending(file) in _REFUSED:
        raise UserError(f"{file}: {_REFUSED[_ending(file)]}; {SUPPORTED}")
    refuse_pointer(file)
    kind, compression = _format_of(file)
    if kind == "parquet":
        yield from _read_parquet(file, fields)
        return
    with _OPENERS[compression](file) as stream:
        if kind == PLAIN:
            yield _read_plain(file, stream, fields)
        else:
            yield from _READERS[kind](file, stream)


def _format_of(file: Path) -> tuple[str, str]:
    """Format and compression, by the endings of the name."""
    compression = file.suffix.lower() if file.suffix.lower() in _OPENERS else ""
    return _BY_ENDING.get(_ending(file), PLAIN), compression


def _ending(file: Path) -> str:
    """The ending that tells the format, in lower case, without the one that tells the compression."""
    return Path(file.stem if file.suffix.lower() in _OPENERS else file.name).suffix.lower()


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


def _read_plain(file: Path, stream: BinaryIO, fields: Sequence[str]) -> Placed:
    text = io.TextIOWrapper(stream, encoding="utf-8").read().removeprefix(_BOM)
    if "\0" in text:
        raise UserError(f"{file}: not text (it holds NUL bytes); {SUPPORTED}")
    if len(fields) > 1:
        raise UserError(f"{file}: is read as plain text, which has no fields {' and '.join(fields)}; {SUPPORTED}")
    return str(file), {fields[0]: text}


def _read_jsonl(file: Path, stream: BinaryIO) -> Iterator[Placed]:
    for number, line in enumerate(stream, start=1):
        where = f"{file}:{number}"
        text = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, where)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith(b"\n") else "; is the file cut short?"
            raise UserError(f"{where}: not valid JSON ({error}){cut}") from None
        yield where, _object(record, where)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason}){_hint(line)}; {SUPPORTED}") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object")
    return value


def _read_json(file: Path, stream: BinaryIO) -> Iterator[Placed]:
    text = _JsonText(io.TextIOWrapper(stream, encoding="utf-8-sig"))
    is_array = text.skip("[")
    number = 0
    while text.next_character() and not (is_array and text.next_character() == "]"):
        number += 1
        where = f"{file}, record {number}"
        yield where, _object(text.value(where), where)
        if is_array and not text.skip(",") and text.next_character() != "]":
            cut = "" if text.next_character() else "; is the file cut short?"
            raise UserError(f"{where}: not followed by ',' or ']'{cut}")
    if is_array and (not text.skip("]") or text.next_character()):
        raise UserError(f"{file}: the array is not closed, or something follows it; is the file damaged?")


class _JsonText:
    """The values in a stream of JSON, read only as far as needed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._text = ""
        self._place = 0
        self._decoder = json.JSONDecoder()

    def next_character(self) -> str:
        """The next character that isn't white space, without going past it; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            assert space is not None
            self._place = space.end()
            if self._place < len(self._text) or not self._read_on():
                return self._text[self._place : self._place + 1]

    def skip(self, character: str) -> bool:
        """Go past the next character if it is this one; return whether it was."""
        found = self.next_character() == character
        self._place += found
        return found

    def value(self, where: str) -> Any:
        """The next value.

        Raises:
            UserError: where it isn't valid.
        """
        while True:
            try:
                value, self._place = self._decoder.raw_decode(self._text, self._place)
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._read_on():
                    raise UserError(f"{where}: not valid JSON ({error})") from None
            else:
                return value

    def _read_on(self) -> bool:
        """Read at least as much again as is waiting, so that a long value takes few attempts; False at the end."""
        more = self._stream.read(max(_CHUNK_CHARACTERS, len(self._text) - self._place))
        self._text, self._place = self._text[self._place :] + more, 0
        return bool(more)


def _read_table(file: Path, stream: BinaryIO, separator: str) -> Iterator[Placed]:
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=separator, strict=True)
    names = next(rows, [])
    if len(set(names)) < len(names):
        raise UserError(f"{file}: a field appears twice in the first line, which must name the fields")
    for row in rows:
        where = f"{file}:{rows.line_num}"
        if row and len(row) != len(names):
            raise UserError(f"{where}: {len(row)} fields, but the first line names {len(names)}")
        if row:
            yield where, dict(zip(names, row, strict=True))


_READERS: dict[str, Callable[[Path, BinaryIO], Iterator[Placed]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": lambda file, stream: _read_table(file, stream, ","),
    "tsv": lambda file, stream: _read_table(file, stream, "\t"),
}


def _read_parquet(file: Path, fields: Sequence[str]) -> Iterator[Placed]:
    """Yield the rows of a Parquet file; columns that aren't wanted are named in them, but not read."""
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            columns = [field for field in fields if field in names]
            if repeated := [field for field in columns if names.count(field) > 1]:
                raise UserError(f"{file}: several columns are named {repeated[0]!r}; rename all but one")
            unread = dict.fromkeys(names) if len(columns) < len(fields) else {}
            batches = table.iter_batches(batch_size=1024, columns=columns)
            for number, record in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
                yield f"{file}, row {number}", unread | record
    except ArrowException as error:
        raise UserError(f"{file}: not a whole Parquet file ({' '.join(str(error).split())})") from None
    except (OverflowError, KeyError) as error:  # a time or time zone that Python lacks, in a column that is wanted
        raise UserError(f"{file}: {' or '.join(columns)} holds times, not text ({error})") from None


@contextmanager
def _explaining(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason}){_hint(error.object)}; {SUPPORTED}") from None
    except csv.Error as error:
        raise UserError(f"{file}: not valid CSV ({error})") from None
    except EOFError:
        raise UserError(f"{file}: its compressed data ends early; is the file cut short?") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or error}") from None


def _hint(begin: bytes) -> str:
    """What a file really is, if its first bytes tell."""
    return next((f"; {hint}" for signature, hint in _SIGNATURES.items() if begin.startswith(signature)), "")

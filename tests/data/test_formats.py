"""The same documents in every format that can be read, and the identity of a text in fingerprints."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hfprune_dist.data.formats import identity_of, read_files
from hfprune_dist.data.text import read_beginning, read_texts
from hfprune_dist.errors import UserError
from hfprune_dist.store.hashing import FileHashes

# Line ends, quotes, separators and non-ASCII characters, but nothing that csv and plain text can't tell apart.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0")
DOCUMENTS = st.lists(
    st.text(CHARACTERS, max_size=60) | st.sampled_from(['a "b",\tc\r\n', "\ufeffx", "é\u2028ü"]), max_size=8
)
COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


def json_lines(documents):
    return "".join(json.dumps({"text": text, "number": 1}) + "\n" for text in documents)


def table(documents, separator):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator)
    writer.writerows([["number", "text"], *(["1", text] for text in documents)])
    return stream.getvalue()


RECORDS = {
    ".jsonl": json_lines,
    ".ndjson": lambda documents: json_lines(documents).replace("\n", "\r\n\r\n"),
    ".json": lambda documents: json.dumps([{"text": text} for text in documents], ensure_ascii=False, indent=1),
    ".JSON": json_lines,
    ".csv": lambda documents: table(documents, ","),
    ".tsv": lambda documents: table(documents, "\t"),
}


def parquet_of(documents):
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": pyarrow.array(documents, pyarrow.large_string())}), stream)
    return stream.getvalue()


def every_format(documents):
    """Return names of files and their content."""
    for ending, write in RECORDS.items():
        for compression, compress in COMPRESSIONS.items():
            yield f"text{ending}{compression}", compress(write(documents).encode())
            if ending != ".ndjson":
                yield f"marked{ending}{compression}", compress(b"\xef\xbb\xbf" + write(documents).encode())
    yield "text.parquet", parquet_of(documents)


def texts_of(path):
    return [text for (text,) in read_texts({}, path, ["text"], 0, "here")]


@settings(max_examples=6)
@given(DOCUMENTS.filter(bool))
def test_every_format_gives_the_same_texts(documents):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in every_format(documents):
            (Path(folder) / name).write_bytes(content)
            assert texts_of(Path(folder) / name) == documents, name


def test_a_folder_stands_for_its_files_in_order(tmp_path):
    (tmp_path / "b.csv").write_text("text\nthree\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(["one", "two"]).encode()))
    (tmp_path / "c.txt").write_text("four")
    for name in ("README.md", ".hidden.jsonl", "picture.png"):
        (tmp_path / name).write_text("nothing")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.txt").write_text("nothing")
    assert texts_of(tmp_path) == ["one", "two", "three", "four"]


def test_a_wide_table_is_read_by_column(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a"], "embedding": [[0.5] * 9]}), tmp_path / "wide.parquet")
    assert [record for _, record in read_files(tmp_path / "wide.parquet", ["text"])] == [{"text": "a"}]
    with pytest.raises(UserError, match="the record has embedding, text"):
        list(read_texts({}, tmp_path / "wide.parquet", ["body"], 0, "here"))


# Fingerprints.


def identity(path):
    return identity_of(path, FileHashes(None))


def test_what_is_read_otherwise_is_something_else(tmp_path):
    """The same bytes are different texts as plain text, as records and as a table."""
    names = ["text.jsonl", "text.txt", "text.json", "text.csv", "text.tsv", "text.json.gz"]
    for name in names:
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert len({identity(tmp_path / name) for name in names}) == len(names)


def test_names_and_places_of_files_are_not_part_of_it(tmp_path):
    for folder, names in (("one", ["a.csv", "b.csv"]), ("two", ["x.csv", "y.csv"])):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, ["text\n1\n", "text\n2\n"], strict=True):
            (tmp_path / folder / name).write_text(content)
    assert identity(tmp_path / "one") == identity(tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("not read")
    assert identity(tmp_path / "one") == identity(tmp_path / "two")
    (tmp_path / "two" / "x.csv").rename(tmp_path / "two" / "z.csv")
    assert identity(tmp_path / "one") != identity(tmp_path / "two")


# Large files.


def test_the_check_reads_the_beginning_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune_dist.data.text.CHECKED_CHARACTERS", 100)
    (tmp_path / "large.jsonl").write_text(json_lines(["x" * 30] * 10) + "{damaged")
    beginning = read_beginning(tmp_path / "large.jsonl", ["text"], "here")
    assert (len(beginning.texts), beginning.is_all) == (4, False)
    with pytest.raises(UserError, match=r"large.jsonl:11: not valid JSON"):
        texts_of(tmp_path / "large.jsonl")


# What can't be read.

DOCUMENT = "a document"
LINE = json.dumps({"text": DOCUMENT})
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 500\n"


def csv_of(*rows, separator=","):
    return "\n".join(separator.join(row) for row in rows) + "\n"


# File name, content and parts of the message.
UNREADABLE = [
    ("empty.jsonl", "", ["empty.jsonl", "no records"]),
    ("cut.jsonl", f"{LINE}\n{LINE[:-9]}", ["cut.jsonl:2", "not valid JSON", "cut short"]),
    ("half.jsonl", f'{LINE}\n{{"text": "\\ud800"}}', ["half.jsonl:2", "surrogate"]),
    ("null.jsonl", f'{LINE}\n{{"text": null}}\n', ["null.jsonl:2", "holds None"]),
    ("other.jsonl", f'{LINE}\n{{"body": "x"}}\n', ["other.jsonl:2", "no text in field", "the record has body"]),
    ("wide.jsonl", LINE.encode("utf-16"), ["wide.jsonl", "not UTF-8"]),
    ("pointer.jsonl", LFS_POINTER, ["pointer.jsonl", "Git LFS pointer", "git lfs pull"]),
    ("cut.jsonl.gz", gzip.compress(LINE.encode())[:-12], ["cut.jsonl.gz", "cut short"]),
    ("plain.jsonl.gz", LINE, ["plain.jsonl.gz", "gzip"]),
    ("plain.jsonl.zst", LINE, ["plain.jsonl.zst"]),
    ("cut.json", f"[{LINE}, {LINE}", ["cut.json", "cut short"]),
    ("ragged.csv", csv_of(["text", "instruction", "response"], ["a", "b"]), ["ragged.csv:2", "2 fields", "3"]),
    ("open.csv", 'text,instruction,response\n"a,b,c\n', ["open.csv", "CSV"]),
    ("text.parquet", LINE, ["text.parquet", "Parquet"]),
    ("picture.png", b"\x89PNG\r\n\x1a\n", ["picture.png", "not UTF-8", "supported"]),
    ("zeros.bin", bytes(1000), ["zeros.bin", "no plain text", "supported"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), UNREADABLE, ids=[name for name, *_ in UNREADABLE])
def test_what_is_wrong_with_a_file_is_one_message_that_names_it(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        texts_of(tmp_path / name)
    for part in expected:
        assert part in str(caught.value)

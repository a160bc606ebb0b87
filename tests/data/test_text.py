"""The same documents in every format that can be read, their identity in fingerprints, and streams of the hub."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hfprune_dist.data import text
from hfprune_dist.data.text import identity_of, read_beginning, read_texts, require_data_set
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


def parquet_of(documents, field="text"):
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({field: pyarrow.array(documents, pyarrow.large_string())}), stream)
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
    return list(read_texts({}, path, "text", 0, "here"))


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


def identity(path):
    return identity_of(path, FileHashes(None))


def test_the_identity_is_that_of_contents_and_of_how_they_are_read(tmp_path):
    names = ["text.jsonl", "text.txt", "text.json", "text.csv", "text.tsv", "text.json.gz"]
    for name in names:
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert len({identity(tmp_path / name) for name in names}) == len(names)
    for folder, names in (("one", ["a.csv", "b.csv"]), ("two", ["x.csv", "y.csv"])):
        (tmp_path / folder).mkdir()
        for name, content in zip(names, ["text\n1\n", "text\n2\n"], strict=True):
            (tmp_path / folder / name).write_text(content)
    assert identity(tmp_path / "one") == identity(tmp_path / "two")
    (tmp_path / "two" / "README.md").write_text("not read")
    assert identity(tmp_path / "one") == identity(tmp_path / "two")
    (tmp_path / "two" / "x.csv").rename(tmp_path / "two" / "z.csv")
    assert identity(tmp_path / "one") != identity(tmp_path / "two")


def test_the_check_reads_the_beginning_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("hfprune_dist.data.text.CHECKED_CHARACTERS", 100)
    (tmp_path / "large.jsonl").write_text(json_lines(["x" * 30] * 10) + "{damaged")
    beginning = read_beginning(read_texts({}, tmp_path / "large.jsonl", "text", 0, "here"))
    assert (len(beginning.records), beginning.is_all) == (4, False)
    with pytest.raises(UserError, match=r"large.jsonl:11: it can't be read"):
        texts_of(tmp_path / "large.jsonl")


# What can't be read.

DOCUMENT = "a document"
LINE = json.dumps({"text": DOCUMENT})
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 500\n"


# File name, content and parts of the message.
UNREADABLE = [
    ("empty.jsonl", "", ["empty.jsonl", "no records"]),
    ("cut.jsonl", f"{LINE}\n{LINE[:-9]}", ["cut.jsonl:2", "cut short"]),
    ("other.jsonl", f'{LINE}\n{{"body": "x"}}\n', ["other.jsonl:2", "no text in field", "the record has body"]),
    ("pointer.jsonl", LFS_POINTER, ["pointer.jsonl", "Git LFS pointer", "git lfs pull"]),
    ("cut.jsonl.gz", gzip.compress(LINE.encode())[:-12], ["cut.jsonl.gz", "cut short"]),
    ("cut.json", f"[{LINE}, {LINE}", ["cut.json", "cut short"]),
    ("texts.json", '["a text", "{}"]', ["texts.json, record 1", "expected a JSON object"]),
    ("ragged.csv", "text,instruction,response\na,b\n", ["ragged.csv:2", "2 fields", "3"]),
    ("other.parquet", parquet_of(["a"], "body"), ["other.parquet", "no text in field 'text'", "body"]),
    ("picture.png", b"\x89PNG\r\n\x1a\n", ["picture.png", "utf-8", "supported"]),
]


@pytest.mark.parametrize(("name", "content", "expected"), UNREADABLE, ids=[name for name, *_ in UNREADABLE])
def test_what_is_wrong_with_a_file_is_one_message_that_names_it(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        texts_of(tmp_path / name)
    for part in expected:
        assert part in str(caught.value)


SOURCE = {"dataset": "org/texts", "name": None, "split": "train", "revision": None}


@pytest.mark.parametrize("error", [*HfHubHTTPError.__bases__, RuntimeError])
def test_a_stream_that_breaks_off_is_an_error_of_the_user(monkeypatch, error):
    """Whichever library the hub's client uses: its errors need not be the operating system's."""

    def shuffle(**_):
        yield {"text": "the first"}
        raise error("the connection was reset")

    library = SimpleNamespace(load_dataset=lambda *_, **__: SimpleNamespace(shuffle=shuffle))
    monkeypatch.setitem(sys.modules, "datasets", library)
    texts = read_texts(SOURCE, None, "text", 0, "calibration")
    assert next(texts) == "the first"
    with pytest.raises(UserError, match=r"'org/texts' .*: the connection was reset; .* or give a local file with path"):
        next(texts)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """Its client would go on for half a minute."""
    opened = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", mock.Mock(side_effect=OSError("no network")))
    monkeypatch.setattr(text, "_open", lambda _: opened.append(constants.HF_HUB_OFFLINE))
    require_data_set(SOURCE)
    assert opened == [True] and not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(HfApi, "dataset_info", mock.Mock())
    for asked in (SOURCE, {**SOURCE, "split": None}):  # of which a task knows better how to open it
        require_data_set(asked)
    assert opened == [True, False]

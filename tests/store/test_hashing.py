"""Digests change with content and names, and with nothing else; a file is read once, unless it may have changed."""

import errno
import hashlib
import os
import time

import pytest
from hypothesis import strategies as st

from hfprune_dist.errors import UserError
from hfprune_dist.store import hashing as identity
from hfprune_dist.store.hashing import FileHashes, digest_of, files_below

NAMES = st.text("ab_.", min_size=1, max_size=4).filter(lambda name: set(name) - {"."})


def settle(*files):
    """Let files count as long unchanged; since the kernel's time of change can't be set, the rule is moved instead."""
    newest = max(file.stat().st_ctime_ns for file in files)
    while time.time_ns() <= newest:
        time.sleep(0.001)


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read."""
    seen, compute = [], FileHashes._compute
    monkeypatch.setattr(identity, "STABLE_NS", 0)
    monkeypatch.setattr(
        FileHashes, "_compute", lambda self, file, *rest: seen.append(file.name) or compute(self, file, *rest)
    )
    return seen


@pytest.mark.parametrize(
    "name", ["_default_template_yaml", "_utils.py", "sub/_helper.py", "_private/task.yaml", "__init__.py"]
)
def test_templates_and_helpers_of_tasks_count(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("before")
    before = FileHashes(None).of_folder(tmp_path)
    file.write_text("after!")
    assert FileHashes(None).of_folder(tmp_path) != before


@pytest.mark.parametrize(
    "name", [".hidden", ".git/config", "__pycache__/_utils.pyc", "sub/__pycache__/x.pyc", "sub/.x.swp"]
)
def test_what_tools_leave_behind_does_not_count(tmp_path, name):
    (tmp_path / "task.yaml").write_text("task")
    before = FileHashes(None).of_folder(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    assert FileHashes(None).of_folder(tmp_path) == before


def test_links_are_followed_but_never_in_circles(tmp_path):
    folder, elsewhere = tmp_path / "tasks", tmp_path / "disk"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "data.jsonl").write_text("{}")
    (folder / "data").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    (elsewhere / "up").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    assert files_below(folder) == ["data/data.jsonl"]
    before = FileHashes(None).of_folder(folder)
    (elsewhere / "data.jsonl").write_text("[]")
    assert FileHashes(None).of_folder(folder) != before


def test_a_file_is_read_once_by_all_processes_together(tmp_path, reads):
    file, cache = tmp_path / "weights", tmp_path / "hashes"
    file.write_text("weights")
    settle(file)
    first = FileHashes(cache)
    expected = first.of_file(file)
    assert first.of_file(file) == expected and reads == ["weights"]
    first.save()
    assert FileHashes(cache).of_file(file) == expected and reads == ["weights"]


@pytest.mark.parametrize(
    "change", ["size", "content", "content under the old times", "another file under the old times"]
)
def test_whatever_changes_is_read_again(tmp_path, reads, change):
    file, cache = tmp_path / "weights", tmp_path / "hashes"
    file.write_text("weights")
    settle(file)
    hashes = FileHashes(cache)
    before = hashes.of_file(file)
    hashes.save()
    stat = file.stat()
    target = tmp_path / "other" if change.startswith("another") else file
    target.write_text("longer weights" if change == "size" else "Weights")
    if "times" in change:
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    target.replace(file)
    assert FileHashes(cache).of_file(file) != before and len(reads) == 2


def test_a_file_that_has_just_changed_is_not_remembered_for_others(tmp_path):
    """It may change again within the same tick of the file system's clock, and look unchanged."""
    file, cache = tmp_path / "weights", tmp_path / "hashes"
    file.write_text("weights")
    hashes = FileHashes(cache)
    hashes.of_file(file)
    hashes.save()
    assert not cache.exists()


@pytest.mark.parametrize("entry", ["", "{", "[]", "3", '{"key": 1}', '{"sha256": "x"}'])
def test_a_damaged_memory_is_none(tmp_path, reads, entry):
    file, cache = tmp_path / "weights", tmp_path / "hashes"
    file.write_text("weights")
    settle(file)
    hashes = FileHashes(cache)
    expected = hashes.of_file(file)
    hashes.save()
    (remembered,) = cache.iterdir()
    remembered.write_text(entry)
    assert FileHashes(cache).of_file(file) == expected and len(reads) == 2


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(identity, "LARGE_BYTES", 1)
    monkeypatch.setattr(identity, "CHUNK_BYTES", 4)


def files_of_sizes(folder, *sizes):
    files = {folder / f"{number}.safetensors": size for number, size in enumerate(sizes)}
    for file, size in files.items():
        file.write_bytes(bytes(range(size)))
    return files


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("sizes", [(9, 17, 0, 30), (5, 0), ()])
def test_large_files_have_the_digest_that_they_have_one_after_another(tmp_path, sizes):
    names = [file.name for file in files_of_sizes(tmp_path, *sizes)]
    one_by_one = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names}
    assert FileHashes(None).of_files(tmp_path, names) == digest_of(one_by_one)


def test_what_can_not_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone: No such file"):
        FileHashes(None).of_file(tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone: no such folder"):
        FileHashes(None).of_folder(tmp_path / "gone")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """On NFS, what was opened is stale then."""
    file, compute, refused = tmp_path / "text", FileHashes._compute, []
    file.write_text("before")

    def replaced_meanwhile(self, path, *rest):
        if not refused:
            refused.append(path)
            path.write_text("after")
            raise OSError(errno.ESTALE, "stale")
        return compute(self, path, *rest)

    monkeypatch.setattr(FileHashes, "_compute", replaced_meanwhile)
    assert FileHashes(None).of_file(file) == hashlib.sha256(b"after").hexdigest() and refused

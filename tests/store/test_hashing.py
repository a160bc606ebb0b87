"""Digests change with content and names, and with nothing else; a file is read once, unless it may have changed."""

import hashlib
import os
import time

import pytest

from hfprune_dist.errors import UserError
from hfprune_dist.store import hashing as identity
from hfprune_dist.store.hashing import FileHashes, digest_of, files_below


def settle(*files):
    """Let files count as long unchanged; since the kernel's time of change can't be set, the rule is moved instead."""
    newest = max(file.stat().st_ctime_ns for file in files)
    while time.time_ns() <= newest:
        time.sleep(0.001)


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that are read."""
    seen, compute = [], identity._sha256_of
    monkeypatch.setattr(identity, "STABLE_NS", 0)
    monkeypatch.setattr(identity, "_sha256_of", lambda file: seen.append(file.name) or compute(file))
    return seen


def test_links_are_followed_but_never_in_circles_and_what_tools_leave_behind_does_not_count(tmp_path):
    folder, elsewhere = tmp_path / "tasks", tmp_path / "disk"
    (folder / "__pycache__").mkdir(parents=True)
    elsewhere.mkdir()
    for name in (".x.swp", "__pycache__/_utils.pyc"):
        (folder / name).touch()
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
    (remembered,) = cache.iterdir()
    remembered.write_text("{")
    assert FileHashes(cache).of_file(file) == expected and len(reads) == 2


@pytest.mark.parametrize("change", ["size", "content under the old times", "another file under the old times"])
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
    (tmp_path / "weights").write_text("weights")
    hashes = FileHashes(tmp_path / "hashes")
    hashes.of_file(tmp_path / "weights")
    hashes.save()
    assert not (tmp_path / "hashes").exists()


def test_large_files_have_the_digest_that_they_have_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "LARGE_BYTES", 1)
    one_by_one = {}
    for number, size in enumerate((9, 17, 0, 30)):
        (tmp_path / f"{number}.safetensors").write_bytes(bytes(range(size)))
        one_by_one[f"{number}.safetensors"] = hashlib.sha256(bytes(range(size))).hexdigest()
    assert FileHashes(None).of_files(tmp_path, one_by_one) == digest_of(one_by_one)


def test_what_can_not_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone: No such file"):
        FileHashes(None).of_file(tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone: no such folder"):
        FileHashes(None).of_folder(tmp_path / "gone")

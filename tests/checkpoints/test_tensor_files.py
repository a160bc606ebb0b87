import os
from pathlib import Path

import pytest
import torch
from damage import DAMAGES, damage
from hypothesis import given, settings

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, is_usable, load_tensors, save_tensors

TENSORS = {
    "weights": torch.arange(6.0).reshape(2, 3).bfloat16(),
    "none": torch.zeros(0, 3),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
}
TEXTS = {"step": "3", "losses": "[]", "more": "é"}


def test_what_was_written_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_tensors(TENSORS, file, TEXTS)
    tensors, texts = load_tensors(file)
    assert texts == TEXTS and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    content = file.read_bytes()
    save_tensors(TENSORS, file, TEXTS)
    assert file.read_bytes() == content


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("written") / "a.safetensors"
    save_tensors(TENSORS, file, TEXTS)
    return file, file.read_bytes()


@settings(max_examples=200)
@given(how=DAMAGES)
def test_any_damage_is_noticed(written, how):
    file, content = written
    file.write_bytes(content)
    if damage(file, *how):
        with pytest.raises(DamagedFileError):
            load_tensors(file)


def test_damaged_files_are_set_aside_and_not_deleted(tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    assert not is_usable(file)
    for content in (b"one", b"two"):
        file.write_bytes(content)
        assert not is_usable(file) and not file.exists()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.safetensors.damaged-1": b"one",
        "a.safetensors.damaged-2": b"two",
    }
    assert "set aside as a.safetensors.damaged-2" in capsys.readouterr().out.splitlines()[1]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_anything_else(tmp_path, monkeypatch):
    operations = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle):
        operations.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def note_replace(source, target):
        operations.append(("replace", Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_tensors(TENSORS, tmp_path / "a.safetensors")
    assert operations == [("fsync", "a.draft"), ("replace", "a.draft", "a.safetensors"), ("fsync", tmp_path.name)]

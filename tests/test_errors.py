"""Whatever the operating system refuses is reported in one message, wherever it was refused."""

import errno
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.tensor_files import save_tensors
from hfprune_dist.checkpoints.write_pruned import write_weight_file
from hfprune_dist.data.windows import WINDOWS, save_windows
from hfprune_dist.errors import UserError, did_you_mean, explained, from_os_error
from hfprune_dist.export.gguf_file import write_gguf
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.structures.kept import Kept


def test_a_full_disk_met_by_safetensors_is_one_too(tmp_path):
    """Its errors are not OSErrors."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(Exception, match="os error") as met:
        save_file({"a": torch.zeros(2)}, tmp_path / "loop" / "file")
    assert not isinstance(met.value, OSError) and from_os_error(met.value) is met.value, "nothing the user can mend"
    for error in (ValueError("28"), UserError("task 'a': (os error 13)"), FileExistsError(17, "")):
        assert from_os_error(error) is error, "it says more already, or would be our own bug"
    full = type(met.value)(f"Error while serializing: I/O error: No space left on device (os error {errno.ENOSPC})")
    mended = from_os_error(full)
    assert isinstance(mended, UserError) and "No space left on device; make room" in str(mended)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (lambda file: (file / "sub").mkdir(), "Not a directory; give a folder"),
        (lambda file: file.mkdir(), "File exists; give another path"),
        (lambda file: file.parent.read_text(), "Is a directory; give a file"),
    ],
)
def test_a_wrong_path_ends_a_command_with_one_message(tmp_path, capsys, action, expected):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as ended, explained():
        action(file)
    assert ended.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "valid", "told"),
    [
        ("model 0.4", ["model dense", "model 0.4 hfprune"], "; did you mean 'model 0.4 hfprune'?"),
        ("modle", ["model", "method"], "; did you mean 'model'?"),
        ("LLAMA", ["qwen", "Llama"], "; did you mean 'Llama'?"),
        ("", ["model"], ""),
        ("zebra", ["model"], ""),
    ],
)
def test_what_begins_alike_is_meant_before_what_looks_alike(word, valid, told):
    assert did_you_mean(word, valid) == told


@pytest.fixture
def full(tmp_path):
    """A disk with room for names, but for no content."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)], check=True)
    (disk / "all").write_bytes(bytes(4096))
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # where a writer has left its file open


def write_weights(file):
    dense = save_tiny(file.parent.parent / "dense")
    write_weight_file(open_checkpoint(dense), file.name, Kept((0,), {}), file.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", lambda file: write_json(file, {})),
        ("a.safetensors", lambda file: save_tensors({"a": torch.zeros(2)}, file)),
        (WINDOWS, lambda file: save_windows(torch.zeros(1, 2), file.parent)),
        ("model.safetensors", write_weights),
        ("model.gguf", lambda file: write_gguf(open_checkpoint(save_tiny(file.parent.parent / "dense")), file)),
        ("a.py", lambda file: shutil.copyfile(__file__, file)),
    ],
)
def test_a_full_disk_is_told_with_the_file_that_was_written(full, name, write):
    with pytest.raises(Exception, match=r"No space left|os error 28") as met:
        write(full / name)
    assert str(from_os_error(met.value)).startswith(f"{full / name}: No space left on device; make room")

"""Tiny checkpoints that are copied are those that would be made anew, and leave the same random numbers behind."""

import torch
from families import make_model, save_model
from tiny import save_tiny, tiny_model, tiny_tokenizer
from written_once import MOST, write_once


def files_in(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def made(folder, model):
    """Write a checkpoint without ``write_once``; return its files and the next random number."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return files_in(folder), torch.rand(1)


def test_a_copy_has_the_files_and_leaves_the_random_numbers_of_a_model_that_is_made(tmp_path):
    for name, save, make in (("qwen2", save_tiny, tiny_model), ("arcee", save_model, make_model)):
        for width in (24, 25):
            changes = {"intermediate_size": width}
            expected = made(tmp_path / f"{name} {width} made", make(name, **changes))
            for time in range(2):
                torch.manual_seed(time)
                folder = save(tmp_path / f"{name} {width} {time}", name, **changes)
                assert (files_in(folder), torch.rand(1)) == expected


def test_files_are_made_once_until_too_many_others_were(tmp_path):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "file").write_text(str(len(calls)))

    for key in ("a", "b", "a"):
        assert files_in(write_once(tmp_path / key, f"of this test: {key}", make)).keys() == {"file"}
    assert len(calls) == 2 and files_in(tmp_path / "a") == {"file": b"1"}
    (tmp_path / "a" / "file").write_text("changed")
    assert files_in(write_once(tmp_path / "again", "of this test: a", make)) == {"file": b"1"}
    for key in range(MOST):
        write_once(tmp_path / "others", f"of this test: {key}", make)
    write_once(tmp_path / "a", "of this test: a", make)
    assert len(calls) == 2 + MOST + 1

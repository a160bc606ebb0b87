"""Damage to files as a node's death or a bad disk leaves it."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import strategies as st
from safetensors.torch import save_file

from hfprune_dist.checkpoints import tensor_files

# Share of the file that is intact, and what follows it up to the old length.
DAMAGES = st.tuples(st.floats(0, 0.999), st.sampled_from(("nothing", "zeros", "garbage")))


def damage(file: Path, share: float, rest: str) -> bool:
    """Damage a file in this way and return whether its content changed."""
    content = file.read_bytes()
    whole = int(share * len(content))
    missing = len(content) - whole
    after = {"nothing": b"", "zeros": bytes(missing), "garbage": random.Random(whole).randbytes(missing)}[rest]
    file.write_bytes(content[:whole] + after)
    return file.read_bytes() != content


@contextmanager
def nothing_reaches_the_disk() -> Iterator[None]:
    """Skip fsync, for tests that save hundreds of times and read only files of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


def forbid_reading(patch: pytest.MonkeyPatch, name: str) -> None:
    """Deny the right to read one of our files of tensors, by its name, even to root."""
    about = tensor_files._about

    def refuse(file: Path) -> object:
        return _refuse(errno.EACCES, file) if file.name == name else about(file)

    patch.setattr(tensor_files, "_about", refuse)


def fill_disk(patch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Let the disk be full where a module saves a file of tensors, by its name."""

    def refuse(tensors: Any, file: Path, *rest: Any) -> object:
        return _refuse(errno.ENOSPC, file) if file.name == name else save_file(tensors, file, *rest)

    patch.setattr(module, "save_file", refuse)


def _refuse(number: int, file: Path) -> NoReturn:
    raise OSError(number, os.strerror(number), str(file))

"""Damage to files as a node's death or a bad disk leaves it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import strategies as st

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
def behind(file: Path) -> Iterator[None]:
    """Leave a file with the times that it had, as what a disk damages keeps them."""
    stat = file.stat()
    yield
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextmanager
def nothing_reaches_the_disk() -> Iterator[None]:
    """Skip fsync, for tests that save hundreds of times and read only files of this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield


@contextmanager
def in_use(name: str) -> Iterator[None]:
    """Leave files of this name where they are: another user's, or open ones on NFS, which stay under other names."""
    remove = os.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", lambda path, **how: Path(path).name == name or remove(path, **how))
        yield

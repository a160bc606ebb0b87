"""What a node's death, or a bad disk, leaves of a file."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import strategies as st

# Share of the file that is whole, and what follows it up to the old length.
DAMAGES = st.tuples(st.floats(0, 0.999), st.sampled_from(("nothing", "zeros", "garbage")))


def damage(file: Path, share: float, rest: str) -> bool:
    """Damage a file in this way; False where that left its content as it was."""
    content = file.read_bytes()
    whole = int(share * len(content))
    missing = len(content) - whole
    after = {"nothing": b"", "zeros": bytes(missing), "garbage": random.Random(whole).randbytes(missing)}[rest]
    file.write_bytes(content[:whole] + after)
    return file.read_bytes() != content


@contextmanager
def nothing_reaches_the_disk() -> Iterator[None]:
    """For tests that save hundreds of times and read files of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _handle: None)
        yield

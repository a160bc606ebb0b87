"""What a node's death, or a bad disk, leaves of a file."""

from __future__ import annotations

import random
from pathlib import Path

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

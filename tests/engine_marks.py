"""Requirements of tests marked ``engine``: an environment that has it, $HFPRUNE_ENGINES/<engine>, else the own one."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest

from hfprune_dist.engines.process import require_engine
from hfprune_dist.errors import UserError

FOLDER = "HFPRUNE_ENGINES"


def python_of(engine: str) -> str:
    """Return the Python that may have an engine."""
    python = Path(os.environ.get(FOLDER, "/nonexistent")) / engine / "bin" / "python"
    return str(python) if python.exists() else sys.executable


@functools.cache
def is_there(engine: str) -> bool:
    """Return whether that Python has the engine."""
    try:
        require_engine(engine, python_of(engine))
    except UserError:
        return False
    return True


def engine_lacking(item: pytest.Item) -> str:
    """Return what is lacking if none of the engines that a test is for is there; empty otherwise."""
    for mark in item.iter_markers("engine"):
        if not any(map(is_there, mark.args)):
            return f"needs {' or '.join(mark.args)}, which {python_of(mark.args[0])} lacks (tests/run.sh --engines)"
    return ""

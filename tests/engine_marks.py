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
def _lacking(engine: str) -> str:
    try:
        require_engine(engine, python_of(engine))
    except UserError as error:
        return str(error)
    return ""


def engine_lacking(item: pytest.Item) -> str:
    """Return what is lacking of an engine that a test requires; empty if nothing is."""
    return next(filter(None, (_lacking(name) for mark in item.iter_markers("engine") for name in mark.args)), "")

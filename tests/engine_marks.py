"""Requirements of tests marked ``engine``: an environment that has it, $HFPRUNE_ENGINES/<engine>, else the own one."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = "HFPRUNE_ENGINES"
MODULES = {"llama.cpp": "llama_cpp_py_sync", "mlx": "mlx_lm", "openvino": "optimum.intel"}


def python_of(engine: str) -> str:
    """Return the Python that may have an engine."""
    python = Path(os.environ.get(FOLDER, "/nonexistent")) / engine / "bin" / "python"
    return str(python) if python.exists() else sys.executable


@functools.cache
def _has(engine: str) -> bool:
    module = MODULES.get(engine, engine)
    script = (
        f"import importlib.util as util; assert util.find_spec({module.split('.')[0]!r}) and util.find_spec({module!r})"
    )
    return not subprocess.run([python_of(engine), "-c", script], capture_output=True, check=False).returncode


def engine_lacking(item: pytest.Item) -> str:
    """Return the engine that a test requires and that isn't there; empty if nothing is lacking."""
    marks = item.iter_markers("engine")
    missing = [name for mark in marks for name in mark.args if not _has(name)]
    return f"needs {missing[0]}, which {python_of(missing[0])} lacks (tests/run.sh --engines)" if missing else ""

"""Bytecode of a snapshot, compiled before jobs run it, since files that they compile themselves may be cut off."""

from __future__ import annotations

import errno
import importlib.util
import marshal
import py_compile
import warnings
from collections.abc import Iterable
from pathlib import Path

_HEADER_BYTES = 16  # magic number, flags, hash of the source (PEP 552)


def compile_sources(sources: Iterable[Path]) -> None:
    """Make sure that each source file has complete bytecode next to it, so that no job writes any.

    Python 3.11 doesn't notice a write that a full disk cuts off: from then on every import of that file fails, even
    once the disk has room again (https://github.com/python/cpython/issues/126606).

    Raises:
        OSError: if the disk is full.
        py_compile.PyCompileError: if a source file isn't valid Python.
    """
    for source in sources:
        bytecode = Path(importlib.util.cache_from_source(str(source)))
        if not _is_whole(bytecode):
            _compile(source, bytecode)


def _compile(source: Path, bytecode: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # about the sources' syntax; whoever runs them sees these
        # Not checked against its source: a snapshot is named for its content, and copying changes the times of files.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), str(bytecode), doraise=True, invalidation_mode=mode)
    if not _is_whole(bytecode):
        bytecode.unlink(missing_ok=True)
        raise OSError(errno.ENOSPC, "No space left on device", str(bytecode))


def _is_whole(bytecode: Path) -> bool:
    try:
        content = bytecode.read_bytes()
        marshal.loads(content[_HEADER_BYTES:])
    except (OSError, EOFError, ValueError, TypeError):
        return False
    return content.startswith(importlib.util.MAGIC_NUMBER)

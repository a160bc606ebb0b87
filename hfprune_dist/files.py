"""Writing files so that a reader, or a resumed run, sees the old content or the new, never half of it."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Replace ``file`` atomically: write a sibling, fsync it, rename it over."""
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def write_json(file: Path, value: Any) -> None:
    """Replace ``file`` atomically with a JSON value."""
    write_text(file, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(file: Path) -> Any:
    """Return the JSON value in ``file``, or None where there is no such file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folders(folder: Path, root: Path) -> None:
    """Flush the entries of ``root``, of ``folder``, and of all folders on the way from one to the other."""
    for path in (folder, *folder.parents):
        fsync_path(path)
        if path == root:
            break

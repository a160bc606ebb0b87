"""Writing files so that a reader, or a resumed run, sees the old content or the new, never half of it."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}


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


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file that others write or remove meanwhile; None where there is none that can be read."""
    try:
        value = read_json(file)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_record(kind: type[T], file: Path) -> T | None:
    """The dataclass that a JSON file holds; None where it holds none.

    A file that has vanished, is damaged or holds something else counts like one that was never written.
    """
    return as_record(kind, read_object(file))


def as_record(kind: type[T], value: dict[str, Any] | None) -> T | None:
    """The dataclass that a JSON object describes, without fields that the class doesn't have; None where it doesn't."""
    try:
        record: T | None = None if value is None else _adapter(kind).validate_python(value)
    except ValidationError:
        return None
    return record


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return _ADAPTERS.get(kind) or _ADAPTERS.setdefault(kind, TypeAdapter(kind))


def listed(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, sorted by name; none where the folder is gone or has just gone."""
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:
        return []


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


def publish(draft: Path, file: Path) -> None:
    """Give a finished draft its name, for good: what a file of that name holds is whole, even if the node dies."""
    fsync_path(draft)
    draft.replace(file)
    fsync_path(file.parent)


def set_aside(file: Path, reason: str) -> None:
    """Rename a file that can't be used, say so, and leave its name free for a new one."""
    number = 1
    while (aside := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    file.rename(aside)
    print(f"{file}: {reason}; set aside as {aside.name}, and what it told is worked out again", flush=True)

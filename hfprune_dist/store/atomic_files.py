"""Atomic writes: a reader, or a resumed run, sees either the old content of a file or the new, never a part of it.

What is read may be replaced or removed at any moment by other hosts; NFS then reports it as stale.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hfprune_dist.errors import UserError, from_os_error, naming

T = TypeVar("T")

# How often something that is stale is read before it counts as an error.
READING_ATTEMPTS = 5
FULL_DISK_BYTES = 64 * 1024
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}  # each takes milliseconds to make


def unless_stale(read: Callable[[], T]) -> T:
    """Read something, from its opening on, and do so again if NFS says that what was opened is stale: a file that
    another host has replaced or removed since, or a folder that it has removed. An OSError of another kind, or one that
    stays, is raised.
    """
    for _ in range(READING_ATTEMPTS - 1):
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return read()


def write_text(file: Path, text: str, *, mode: int = 0o666, durable: bool = True) -> None:
    """Replace ``file`` atomically: write a sibling, with ``mode`` less the umask, fsync it, and rename it over
    ``file``. One that isn't ``durable`` may be damaged after a crash of the machine.
    """
    draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with naming(file), os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def write_json(file: Path, value: Any, *, sort_keys: bool = True, durable: bool = True) -> None:
    """Replace ``file`` atomically with a JSON value of finite numbers; ``durable`` as for ``write_text``."""
    write_text(file, json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n", durable=durable)


def write_jsonl(file: Path, values: Iterable[Any]) -> None:
    """Replace ``file`` atomically with a line of JSON for each value; numbers are finite."""
    write_text(file, "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values))


def read_json(file: Path) -> Any:
    """The JSON value in ``file``, or None if there is no such file."""
    try:
        return json.loads(unless_stale(lambda: file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or if it is damaged or holds something else. An OSError
    of a file system that doesn't answer says nothing about the file, and is raised.
    """
    try:
        value = read_json(file)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_record(kind: type[T], file: Path) -> T | None:
    """Read a dataclass of this kind from a JSON file; None if the file, as ``read_object`` reads it, holds none."""
    return as_record(kind, read_object(file))


def as_record(kind: type[T], value: dict[str, Any] | None) -> T | None:
    """Make a dataclass of this kind from a JSON object, ignoring unknown fields; None if the object doesn't fit."""
    if value is None:
        return None
    adapter = _ADAPTERS.get(kind) or _ADAPTERS.setdefault(kind, TypeAdapter(kind))
    try:
        record: T = adapter.validate_python(value)
    except ValidationError:
        return None
    return record


def listed(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder that match a pattern, sorted by name; empty if there is no such folder (any more). Unlike by
    ``Path.glob``, a folder that can't be listed is an OSError.
    """
    try:
        return unless_stale(lambda: sorted(path for path in folder.iterdir() if fnmatchcase(path.name, pattern)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def modified_at(file: Path) -> float | None:
    """Unix time of a file's last change, by the clock of its file system; None if there is no such file (any more)."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return None


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folders(folder: Path, root: Path) -> None:
    """Flush the entries of ``folder``, of ``root``, and of all folders between them."""
    for path in (folder, *folder.parents):
        fsync_path(path)
        if path == root:
            break


def publish(draft: Path, place: Path) -> None:
    """Give a finished draft, a file or folder, its final name, durably: what has it is whole even if the node dies."""
    mode = usual_mode()
    for path in (*draft.rglob("*"), draft):
        if path.is_file():
            path.chmod(mode)  # safetensors makes files private, which others of a group couldn't resume from
        fsync_path(path)
    draft.replace(place)
    fsync_path(place.parent)


def usual_mode() -> int:
    """The mode of new files: readable and writable, minus the bits in the umask."""
    mask = os.umask(0o077)  # to be read, it has to be set for a moment
    os.umask(mask)
    return 0o666 & ~mask


# What a store needs of its file system.


def require_usable(root: Path) -> None:
    """Create a folder, and refuse one that can't be written to or has no hard links, with which stages are claimed."""
    lacks = "can't be written to"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=root) as probe:
            (Path(probe) / "file").touch()
            lacks = "no hard links, by which stages are claimed, on this file system"
            os.link(Path(probe) / "file", Path(probe) / "link")
    except OSError as error:
        raise UserError(f"{root}: {lacks} ({error.strerror or error}); choose another --out") from None


def unwritable(root: Path) -> str:
    """Say that a folder's disk or quota is full, or that it can only be read; empty if neither."""
    try:
        with tempfile.TemporaryFile(dir=root) as trial:
            trial.write(bytes(FULL_DISK_BYTES))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return str(from_os_error(OSError(error.errno, "", str(root))))
    return ""


def refuse_world_writable(*folders: Path) -> None:
    """Refuse folders to which everybody can write, and whose content decides what jobs run.

    Raises:
        UserError: if everybody can.
    """
    for folder in folders:
        if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
            raise UserError(
                f"{folder}: everybody can write to it, and so decide what your jobs run; chmod o-w {folder}, and give "
                "those who share it a group (umask 002, chmod g+s)"
            )

"""States in which a crash of the machine may leave the files of a process, derived from a recording of one run.

A killed process leaves what it wrote; a machine that loses power also loses what it had not flushed. The model is
that of a journaling file system such as ext4 or XFS, taken literally:

- Operations on names (create, mkdir, link, rename, unlink, rmdir) reach the disk in order: a crash leaves a prefix of
  them. The prefix includes at least everything done before the last fsync of any folder; an fsync of a file
  promises nothing about names.
- The content of a file is safe once it has been fsynced. What was written since may be there whole, not at all, cut in
  half, or as half of it followed by zeros, whatever name the file has by then: a rename over an older file may leave
  the new name with nothing in it. What was fsynced before stays, if later writes only appended to it. The target of a
  symbolic link is part of its name.
- What left the machine (``mark``), such as a submitted job, stays whatever is lost here.

Not in the model: names that reach the disk in another order, single blocks written in any order, disks that lie.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATCHED = ("fsync", "fdatasync", "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir")
FOLDER = -1
# Content of a symbolic link, followed by its target.
LEADS_TO = b"\0leads to "


@dataclass(frozen=True)
class Event:
    """One step of a run. ``kind``: mkdir, rmdir, create, link, unlink, rename (names); write, fsync, sync names,
    mark, unit.
    """

    kind: str
    path: str = ""
    target: str = ""  # of a link or rename
    file: int = FOLDER
    content: bytes = b""
    mtime_ns: int = 0
    value: Any = None  # of a mark

    @property
    def is_of_names(self) -> bool:
        return self.kind in ("mkdir", "rmdir", "create", "link", "unlink", "rename")


class Recorder:
    """Records what this process does below a folder, beginning with what is already there.

    Python's own calls are seen as they are made. What libraries in other languages write is found at the next call, as
    new files and new contents. That is early enough, because only calls make anything durable.

    Args:
        marks: marks that were made before.
        unsynced: fsyncs of paths that contain this text are not recorded, as if the program had none; if empty, all
            are recorded.
    """

    def __init__(self, root: Path, marks: list, unsynced: str = "") -> None:
        self.root = root.resolve()
        self.events = [Event("mark", value=value) for value in marks]
        self._unsynced = unsynced
        self._names: dict[str, int] = {}
        self._seen: dict[int, tuple[int, ...]] = {}
        self._last = FOLDER
        self._originals = {name: getattr(os, name) for name in PATCHED}
        self._look()
        self.events += [Event("fsync", file=file) for file in sorted(self._seen)]
        self.events.append(Event("sync names"))
        self.begins = len(self.events)

    def arm(self) -> None:
        """Start to record."""
        for name in PATCHED:
            setattr(os, name, getattr(self, f"_{name}"))

    def disarm(self) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)
        self._look()

    def unit(self) -> None:
        """Record that a unit of work begins."""
        self._look()
        self.events.append(Event("unit"))

    def mark(self, value: Any) -> None:
        """Record something that no crash takes back."""
        self._look()
        self.events.append(Event("mark", value=value))

    def _fsync(self, target: Any) -> None:
        self._originals["fsync"](target)
        path = Path(f"/proc/self/fd/{target if isinstance(target, int) else target.fileno()}").readlink()
        if not path.is_relative_to(self.root) or (self._unsynced and self._unsynced in str(path)):
            return
        self._look()
        if path.is_dir():
            self.events.append(Event("sync names", str(path.relative_to(self.root))))
        else:
            name = str(path.relative_to(self.root))
            if name in self._names:  # otherwise it was removed meanwhile
                self.events.append(Event("fsync", name, file=self._names[name]))

    _fdatasync = _fsync

    def _rename(self, source, target, *, src_dir_fd=None, dst_dir_fd=None) -> None:
        self._look()
        self._originals["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        old, new = self._inside(source, src_dir_fd), self._inside(target, dst_dir_fd)
        if old is None and new is None:
            return
        assert old is not None and new is not None, f"moved out of, or into, what is recorded: {source}, {target}"
        if self._names[old] == self._names.get(new, FOLDER) != FOLDER:
            return  # two names of one file: a rename does nothing
        self.events.append(Event("rename", old, new))
        _rename(self._names, old, new)

    _replace = _rename

    def _link(self, source, target, **options) -> None:
        self._look()
        self._originals["link"](source, target, **options)
        old, new = self._inside(source), self._inside(target)
        if new is not None:
            assert old is not None, f"linked from outside: {source}"
            self.events.append(Event("link", old, new))
            self._names[new] = self._names[old]

    def _unlink(self, path, *, dir_fd=None) -> None:
        self._gone("unlink", path, dir_fd)

    _remove = _unlink

    def _rmdir(self, path, *, dir_fd=None) -> None:
        self._gone("rmdir", path, dir_fd)

    def _gone(self, kind, path, dir_fd) -> None:
        self._look()
        self._originals[kind](path, dir_fd=dir_fd)
        name = self._inside(path, dir_fd)
        if name is not None:
            self.events.append(Event(kind, name))
            del self._names[name]

    def _mkdir(self, path, *arguments, dir_fd=None, **options) -> None:
        self._look()
        self._originals["mkdir"](path, *arguments, dir_fd=dir_fd, **options)
        name = self._inside(path, dir_fd)
        if name is not None:
            self.events.append(Event("mkdir", name))
            self._names[name] = FOLDER

    def _inside(self, path, dir_fd=None) -> str | None:
        """Return the path relative to the root, or None if it is elsewhere."""
        base = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        whole = Path(os.path.normpath(base / os.fsdecode(path)))
        whole = whole.parent.resolve() / whole.name
        return str(whole.relative_to(self.root)) if whole.is_relative_to(self.root) and whole != self.root else None

    def _look(self) -> None:
        """Record files and folders that are new, changed or gone without an observed call."""
        found = set()
        for folder, names, files in os.walk(self.root):
            base = "" if folder == str(self.root) else folder[len(str(self.root)) + 1 :] + "/"
            for name in names:
                found.add(base + name)
                if (Path(folder) / name).is_symlink():
                    self._look_at(base + name)
                elif base + name not in self._names:
                    self._names[base + name] = FOLDER
                    self.events.append(Event("mkdir", base + name))
            for name in files:
                found.add(base + name)
                self._look_at(base + name)
        for name in sorted(self._names.keys() - found, reverse=True):
            kind = "rmdir" if self._names.pop(name) == FOLDER else "unlink"
            self.events.append(Event(kind, name))

    def _look_at(self, name: str) -> None:
        path = self.root / name
        if path.is_symlink():
            self._look_at_link(name, path)
            return
        if name not in self._names:
            self._last += 1
            self._names[name] = self._last
            self.events.append(Event("create", name, file=self._last))
        file, stat = self._names[name], path.stat()
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._seen.get(file) != state:
            self._seen[file] = state
            self.events.append(Event("write", name, file=file, content=path.read_bytes(), mtime_ns=stat.st_mtime_ns))

    def _look_at_link(self, name: str, path: Path) -> None:
        """A link's content is safe before the link has a name."""
        if name not in self._names:
            self._last += 1
            self._names[name] = self._last
            content = LEADS_TO + os.fsencode(path.readlink())
            self.events.append(Event("write", name, file=self._last, content=content))
            self.events.append(Event("fsync", name, file=self._last))
            self.events.append(Event("create", name, file=self._last))


def _rename(names: dict[str, int], old: str, new: str) -> None:
    for name in [name for name in names if name == old or name.startswith(old + "/")]:
        names[new + name[len(old) :]] = names.pop(name)


@dataclass(frozen=True)
class State:
    """A state that a crash may leave.

    Attributes:
        at: number of events before the crash.
        named: number of events whose effects on names reached the disk.
        lost: what happened to contents, for messages.
        names: path -> file, or ``FOLDER``.
        contents: file -> (content, mtime in ns).
        marks: all marks before the crash.
    """

    at: int
    named: int
    lost: str
    names: dict[str, int]
    contents: dict[int, tuple[bytes, int]]
    marks: list[Any] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Make a folder look like this state."""
        folder.mkdir(parents=True)
        first: dict[int, Path] = {}
        for name in sorted(self.names):
            path, file = folder / name, self.names[name]
            if file == FOLDER:
                path.mkdir()
            elif file in first:
                os.link(first[file], path)
            else:
                content, mtime_ns = self.contents[file]
                if content.startswith(LEADS_TO):
                    path.symlink_to(os.fsdecode(content.removeprefix(LEADS_TO)))
                    continue
                path.write_bytes(content)
                os.utime(path, ns=(mtime_ns, mtime_ns))
                first[file] = path

    def signature(self) -> str:
        digest = hashlib.sha256(repr(self.marks).encode())
        places = {
            file: place for place, file in enumerate(dict.fromkeys(self.names[name] for name in sorted(self.names)))
        }
        for name in sorted(self.names):
            file = self.names[name]
            digest.update(f"\n{name}\0{-1 if file == FOLDER else places[file]}\0".encode())
            if file != FOLDER:
                digest.update(_digest(self.contents[file][0]))
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"crash after event {self.at}, names as after {self.named}, {self.lost}"


def states_of(events: list[Event], begins: int) -> list[State]:
    """Return every state that a crash may leave, once; ``begins`` is the number of events before the run.

    If several files are at risk, all are lost; or only one, if the content at risk or its name is new.
    """
    seen: set[str] = set()
    found = []
    for state in _all_states(events, begins):
        signature = state.signature()
        if signature not in seen:
            seen.add(signature)
            found.append(state)
    return found


def _all_states(events: list[Event], begins: int) -> Iterator[State]:
    names: dict[str, int] = {}
    risks: set[frozenset] = set()
    for named in range(len(events) + 1):
        if named:
            _apply(names, events[named - 1])
        if named >= begins and (named == begins or events[named - 1].is_of_names):
            alive = set(names.values()) - {FOLDER}
            for at in _crashes(events, named, alive):
                yield from _with_losses(events, at, named, dict(names), risks)


def _apply(names: dict[str, int], event: Event) -> None:
    if event.kind == "mkdir":
        names[event.path] = FOLDER
    elif event.kind == "create":
        names[event.path] = event.file
    elif event.kind == "link":
        names[event.target] = names[event.path]
    elif event.kind == "rename":
        _rename(names, event.path, event.target)
    elif event.kind in ("unlink", "rmdir"):
        del names[event.path]


def _crashes(events: list[Event], named: int, alive: set[int]) -> Iterator[int]:
    """Yield moments at which a crash may leave these names: until a folder is fsynced after further changes of names.

    Between two of these moments, nothing happens that changes what is left.
    """
    yield named
    others = False
    for at in range(named, len(events)):
        event = events[at]
        if event.kind == "sync names" and others:
            return
        others = others or event.is_of_names
        if event.kind == "mark" or (event.kind == "write" and event.file in alive):
            yield at + 1


def _with_losses(
    events: list[Event], at: int, named: int, names: dict[str, int], risks: set[frozenset]
) -> Iterator[State]:
    alive = set(names.values()) - {FOLDER}
    latest: dict[int, tuple[bytes, int]] = dict.fromkeys(alive, (b"", 0))
    safe: dict[int, bytes] = dict.fromkeys(alive, b"")
    for event in events[:at]:
        if event.file in alive and event.kind == "write":
            latest[event.file] = event.content, event.mtime_ns
        elif event.file in alive and event.kind == "fsync":
            safe[event.file] = latest[event.file][0]
    marks = [event.value for event in events[:at] if event.kind == "mark"]
    yield State(at, named, "nothing lost", names, latest, marks)
    at_risk = [file for file in sorted(alive) if safe[file] != latest[file][0]]
    paths = {file: name for name, file in names.items()}
    risk = frozenset((paths[file], safe[file], latest[file][0]) for file in at_risk)
    alone = [[file] for file in at_risk] if risk not in risks and len(at_risk) > 1 else []
    risks.add(risk)
    for files in [at_risk, *alone] if at_risk else []:
        for loss in ("gone", "half", "zeros"):
            lost = {file: (_lose(safe[file], latest[file][0], loss), latest[file][1]) for file in files}
            told = f"{loss}: {', '.join(paths[file] for file in files)}"
            yield State(at, named, told, names, latest | lost, marks)


# Many states share a file's content and its remains.
@functools.lru_cache(maxsize=4096)
def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@functools.lru_cache(maxsize=4096)
def _lose(safe: bytes, latest: bytes, loss: str) -> bytes:
    """Return the remains of a file that held ``safe`` when it was fsynced, and ``latest`` at the end."""
    kept = len(safe) if latest.startswith(safe) else 0
    half = (kept + len(latest)) // 2
    if loss == "gone":
        return latest[:kept]
    return latest[:half] + (b"\0" * (len(latest) - half) if loss == "zeros" else b"")

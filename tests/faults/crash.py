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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISDIR, S_ISLNK
from typing import Any

PATCHED = ("fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir")
FOLDER = -1
# Content of a symbolic link, followed by its target.
LEADS_TO = b"\0leads to "

Names = Mapping[str, int]  # path -> file, or FOLDER


@dataclass(frozen=True)
class Moment:
    """Something has changed.

    Attributes:
        file: the file that was written; None if names changed, or something left the machine.
        versions: numbers of the versions of names that may be on the disk.
        latest: file -> (content, mtime in ns).
        safe: file -> content when it was last flushed.
        marks: all marks so far.
    """

    file: int | None
    versions: range
    latest: Mapping[int, tuple[bytes, int]]
    safe: Mapping[int, bytes]
    marks: Sequence[Any]


@dataclass(frozen=True)
class Recording:
    """A run, moment by moment. ``versions``: all names, after each change of them."""

    versions: list[Names]
    moments: list[Moment]


class Recorder:
    """Records what this process does below a folder, beginning with what is already there.

    Before and after each call that makes something durable or visible, the folder is compared with what it was: before,
    to find what was written since, in whatever order; afterwards, to find what the call did at once.

    Args:
        unsynced: fsyncs of paths that contain this text are not recorded, as if the program had none; if empty, all
            are recorded.
    """

    def __init__(self, root: Path, unsynced: str = "") -> None:
        self.root = root.resolve()
        self._unsynced = unsynced
        self._names: dict[str, int] = {}
        self._numbers: dict[int, int] = {}  # inode -> number of the file
        self._latest: dict[int, tuple[bytes, int]] = {}
        self._safe: dict[int, bytes] = {}
        self._marks: list[Any] = []
        self._synced = 0
        self._originals = {name: getattr(os, name) for name in PATCHED}
        self.recording = Recording([], [])
        self._look(at_once=True)
        self._safe = {file: content for file, (content, _) in self._latest.items()}
        self.recording = Recording([], [])
        self._renamed(self._names)

    def arm(self) -> None:
        """Start to record."""
        for name in PATCHED:
            setattr(os, name, self._recorded(name))

    def disarm(self) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)
        self._look()

    def mark(self, value: Any) -> None:
        """Record something that no crash takes back."""
        self._look()
        self._marks.append(value)
        self._moment()

    def _recorded(self, name: str) -> Callable[..., None]:
        def call(target: Any, *arguments: Any, **options: Any) -> None:
            self._look()
            self._originals[name](target, *arguments, **options)
            if name == "fsync":
                handle = target if isinstance(target, int) else target.fileno()
                self._flushed(Path(f"/proc/self/fd/{handle}").readlink())
            else:
                self._look(at_once=True)

        return call

    def _flushed(self, path: Path) -> None:
        if not path.is_relative_to(self.root) or (self._unsynced and self._unsynced in str(path)):
            return
        if path.is_dir():
            self._synced = len(self.recording.versions) - 1
        elif (name := str(path.relative_to(self.root))) in self._names:  # otherwise it was removed meanwhile
            self._safe[self._names[name]] = self._latest[self._names[name]][0]

    def _renamed(self, names: dict[str, int]) -> None:
        """Names have changed."""
        self._names = names
        self.recording.versions.append(names)
        self._moment()

    def _moment(self, file: int | None = None) -> None:
        versions = range(self._synced, len(self.recording.versions))
        self.recording.moments.append(Moment(file, versions, dict(self._latest), dict(self._safe), tuple(self._marks)))

    def _look(self, at_once: bool = False) -> None:
        """Record what is new, changed or gone: new names one after another, or all changes of names at once."""
        names, numbers, written = dict[str, int](), dict[int, int](), []
        for path in _below(str(self.root)):
            name, stat = path[len(str(self.root)) + 1 :], os.lstat(path)
            if S_ISDIR(stat.st_mode):
                names[name] = FOLDER
                continue
            file = numbers.get(stat.st_ino, self._numbers.get(stat.st_ino, len(self._latest)))
            names[name] = numbers[stat.st_ino] = file
            if file not in self._latest:
                self._latest[file], self._safe[file] = (b"", 0), b""
            if S_ISLNK(stat.st_mode):
                self._safe[file] = LEADS_TO + os.fsencode(Path(path).readlink())
                self._latest[file] = self._safe[file], 0
            elif self._latest[file][1] != stat.st_mtime_ns or len(self._latest[file][0]) != stat.st_size:
                written.append((file, path, stat.st_mtime_ns))
        self._numbers = numbers
        if not at_once:
            for name in sorted(names.keys() - self._names.keys()):
                self._renamed({**self._names, name: names[name]})
        if names != self._names:
            self._renamed(names)
        for file, path, mtime_ns in written:
            self._latest[file] = Path(path).read_bytes(), mtime_ns
            self._moment(file)


def _below(folder: str) -> Iterator[str]:
    """Yield all paths below a folder, each after those that contain it."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path)


@dataclass(frozen=True)
class State:
    """A state that a crash may leave.

    Attributes:
        at: number of the last moment before the crash.
        named: number of the version of names that reached the disk.
        lost: what happened to contents, for messages.
        contents: file -> (content, mtime in ns).
        marks: all marks before the crash.
    """

    at: int
    named: int
    lost: str
    names: Names
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
        files = dict.fromkeys(self.names[name] for name in sorted(self.names))
        places = {file: place for place, file in enumerate(files)}
        for name in sorted(self.names):
            file = self.names[name]
            digest.update(f"\n{name}\0{-1 if file == FOLDER else places[file]}\0".encode())
            if file != FOLDER:
                digest.update(_digest(self.contents[file][0]))
        return digest.hexdigest()

    def __str__(self) -> str:
        return f"crash after moment {self.at}, names of version {self.named}, {self.lost}"


def states_of(recording: Recording) -> list[State]:
    """Return every state that a crash may leave, once.

    If several files are at risk, all are lost; or only one, if the content at risk or its name is new.
    """
    found: dict[str, State] = {}
    for state in _all_states(recording):
        found.setdefault(state.signature(), state)
    return list(found.values())


def _all_states(recording: Recording) -> Iterator[State]:
    risks: set[frozenset] = set()
    marks = 0
    for at, moment in enumerate(recording.moments):
        for version in moment.versions:
            names = recording.versions[version]
            # Older names can be told apart by this moment only if it is one of their files, or of the world outside.
            is_told = moment.file in names.values() if moment.file is not None else len(moment.marks) > marks
            if is_told or version == moment.versions[-1]:
                yield from _with_losses(at, moment, version, names, risks)
        marks = len(moment.marks)


def _with_losses(at: int, moment: Moment, version: int, names: Names, risks: set[frozenset]) -> Iterator[State]:
    latest, safe = moment.latest, moment.safe
    paths = {file: name for name, file in names.items() if file != FOLDER}
    contents = {file: latest[file] for file in paths}
    marks = list(moment.marks)
    yield State(at, version, "nothing lost", names, contents, marks)
    at_risk = [file for file in sorted(paths) if safe[file] != latest[file][0]]
    risk = frozenset((paths[file], safe[file], latest[file][0]) for file in at_risk)
    alone = [[file] for file in at_risk] if risk not in risks and len(at_risk) > 1 else []
    risks.add(risk)
    for files in [at_risk, *alone] if at_risk else []:
        for loss in ("gone", "half", "zeros"):
            lost = {file: (_lose(safe[file], latest[file][0], loss), latest[file][1]) for file in files}
            told = f"{loss}: {', '.join(paths[file] for file in files)}"
            yield State(at, version, told, names, contents | lost, marks)


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

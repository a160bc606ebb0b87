"""Files shared by several stages of a store: made once, checked before every use, replaced if damaged.

<folder>/<key>        the file
<folder>/<key>.json   its sha256, written last
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import fsync_path, read_object, write_json
from hfprune_dist.store.hashing import FileHashes


class FileCache:
    """Files by key, on the same disk as the work folders that use them.

    A key must cover everything that the file's bytes depend on: if two stages make the file at once, either may win.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def take(self, key: str, target: Path) -> bool:
        """Link ``target`` to the file of this key, without copying; False if there is no intact file to link to."""
        file = self._folder / key
        try:
            if not file.is_file() or FileHashes(None).of_file(file) != self._promised(key):
                return False
            _link(file, target)
        except (OSError, UserError):  # another stage is replacing it, or the file system has no hard links
            return False
        return True

    def put(self, key: str, source: Path) -> None:
        """Keep ``source`` under a key; the file must not change from now on.

        Nothing is kept if the file system has no hard links, if the folder can't be written to, or if another stage is
        keeping the same file at this moment. None of this is an error: the stage has its file and goes on.
        """
        fsync_path(source)
        digest = FileHashes(None).of_file(source)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            _link(source, self._folder / key)
            write_json(self._folder / f"{key}.json", {"sha256": digest})

    def _promised(self, key: str) -> str | None:
        return (read_object(self._folder / f"{key}.json") or {}).get("sha256")


def _link(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``, replacing what it named before; leaves no draft if the process dies.

    Raises:
        OSError: also if another process was faster.
    """
    target.unlink(missing_ok=True)
    os.link(source, target)

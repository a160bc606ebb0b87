"""What Git LFS leaves in place of a large file that was not fetched: a text of three lines."""

from __future__ import annotations

from pathlib import Path

from hfprune_dist.errors import UserError

_BEGIN = b"version https://git-lfs.github.com/"


def refuse_pointer(file: Path) -> None:
    """Refuse a file that only points to the one that is meant.

    Raises:
        UserError: telling how to fetch that one.
        OSError: where the file can't be read.
    """
    with file.open("rb") as stream:
        if stream.read(len(_BEGIN)) == _BEGIN:
            raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned")

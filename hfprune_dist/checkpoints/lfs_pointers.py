"""Git LFS pointers: texts of three lines in place of large files that were not fetched."""

from __future__ import annotations

from pathlib import Path

from hfprune_dist.errors import UserError

_BEGIN = b"version https://git-lfs.github.com/"


def refuse_pointer(file: Path) -> None:
    """Refuse a file that is only a pointer to the real one.

    Raises:
        UserError: saying how to fetch the real one.
        OSError: if the file can't be read.
    """
    with file.open("rb") as stream:
        if stream.read(len(_BEGIN)) == _BEGIN:
            raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned")

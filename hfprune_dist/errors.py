"""The one exception that means: the user can fix this."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_MENDABLE = {
    errno.ENOSPC: "make room on the disk and run the sweep again, it goes on where it stopped",
    errno.EDQUOT: "make room in your quota and run the sweep again, it goes on where it stopped",
    errno.EACCES: "check the permissions",
    errno.EROFS: "choose a folder on a writable file system",
}


class UserError(Exception):
    """Bad input, with a message that says what is wrong, where, and what to do about it.

    Commands print the message without a traceback and exit with code 2 (``EXIT_CODE``).
    """

    EXIT_CODE = 2
    CAUSE = "input"
    """What a failed stage records; see ``progress.Failure``."""


class LostInputError(UserError):
    """An artifact that a stage reads is gone or damaged: it is made again, then the stage can run."""

    CAUSE = "lost input"


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` where a valid word is close to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def from_os_error(error: Exception) -> Exception:
    """Turn an operating system's refusal that the user can mend into a ``UserError``; pass other errors through."""
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        where = f"{error.filename}: " if error.filename else ""
        return UserError(f"{where}{error.strerror}; {_MENDABLE[error.errno]}")
    return error


@contextmanager
def explained() -> Iterator[None]:
    """End a command with one message and exit code 2 where it fails by something that the user can mend."""
    try:
        yield
    except (UserError, OSError) as error:
        mended = from_os_error(error)
        if not isinstance(mended, UserError):
            raise
        print(f"error: {mended}", file=sys.stderr)
        sys.exit(UserError.EXIT_CODE)

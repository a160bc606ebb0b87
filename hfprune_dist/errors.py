"""Errors that the user can fix, and how commands report them."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIXABLE = {
    errno.ENOSPC: "make room on the disk and run the sweep again; it continues where it stopped",
    errno.EDQUOT: "make room in your quota and run the sweep again; it continues where it stopped",
    errno.EACCES: "check the permissions; users that share a store need umask 002 and a folder with the setgid bit",
    errno.EROFS: "choose a folder on a writable file system",
}
# Errors about paths that a user passes to a command; inside a stage they would be bugs of ours.
_WRONG_PATH = {
    errno.ENOTDIR: "give a folder",
    errno.EISDIR: "give a file",
    errno.EEXIST: "give another path",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "give a path whose links lead somewhere",
}
# How Rust libraries such as safetensors report an operating system error; their exceptions are not OSErrors.
_IN_RUST = re.compile(r"\(os error (\d+)\)")


class UserError(Exception):
    """Bad input, with a message that says what is wrong, where, and what to do about it.

    Commands print the message without a traceback and exit with code 2 (``EXIT_CODE``).
    """

    EXIT_CODE = 2
    CAUSE = "input"
    """Cause that a failed stage records; see ``store.attempts.Cause``."""


class LostInputError(UserError):
    """An artifact that a stage reads is missing or damaged; once it has been made again, the stage can run."""

    CAUSE = "lost input"


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` if a valid word begins with ``word``, or is close to it, else ``""``."""
    words, given = {name.lower(): name for name in valid}, word.lower()
    begun = sorted((name for name in words if given and name.startswith(given)), key=len)
    close = begun or difflib.get_close_matches(given, words, n=1)
    return f"; did you mean {words[close[0]]!r}?" if close else ""


def hub_errors() -> tuple[type[Exception], ...]:
    """Errors of a request to the hub: its client's derive from those of an HTTP library that depends on its version."""
    from huggingface_hub.errors import HfHubHTTPError  # which most commands do without

    return (*HfHubHTTPError.__bases__, OSError, ValueError)


def from_os_error(error: Exception) -> Exception:
    """Turn an operating system error that the user can fix into a ``UserError``; return other errors unchanged."""
    return error if isinstance(error, UserError) else _explained(error, _FIXABLE)


def _explained(error: Exception, remedies: Mapping[int, str]) -> Exception:
    number, where = _refusal(error)
    return UserError(f"{where}{os.strerror(number)}; {remedies[number]}") if number in remedies else error


def _refusal(error: Exception) -> tuple[int, str]:
    """Return the operating system's error number (0 if it has none), and a prefix with the file's name if known."""
    if isinstance(error, OSError):
        file = error.filename2 or error.filename  # where there are two, what was written is the second
        cut_short = re.search(r"\d requested and \d", str(error))  # numpy's, without a number, of a full disk
        return errno.ENOSPC if cut_short else error.errno or 0, f"{file}: " if file else ""
    found = _IN_RUST.search(str(error))
    return int(found[1]) if found else 0, ""


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Have the error of a full disk name the file that is written, which those of writing and flushing don't."""
    try:
        yield
    except Exception as error:
        number, where = _refusal(error)
        if number not in _FULL or where:
            raise
        raise OSError(number, os.strerror(number), str(file)) from error


@contextmanager
def explained() -> Iterator[None]:
    """End a command with one message and exit code 2 if it fails with an error that the user can fix."""
    try:
        yield
    except (UserError, OSError) as error:
        reported = error if isinstance(error, UserError) else _explained(error, _FIXABLE | _WRONG_PATH)
        if not isinstance(reported, UserError):
            raise
        print(f"error: {reported}", file=sys.stderr)
        sys.exit(UserError.EXIT_CODE)

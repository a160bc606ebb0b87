"""The frame around every command: an error that the user can fix is one message, and Ctrl-C shows no traceback."""

from __future__ import annotations

import functools
import io
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from hfprune_dist.errors import UserError, explained

SIGPIPE_EXIT_CODE = 141  # what a shell reports for a program ended by SIGPIPE


def command(body: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorator of a command's ``main``, which gets the arguments, by default those of this process."""

    @functools.wraps(body)
    def main(argv: Sequence[str] | None = None) -> int:
        """Run the command and return its exit code."""
        _require_streams()
        try:
            with explained():
                _require_current_folder()
                code = body(argv)
                sys.stdout.flush()
                return code
        except BrokenPipeError:  # the reader of the output, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return SIGPIPE_EXIT_CODE
        except KeyboardInterrupt as interruption:
            print(*interruption.args or ["interrupted; run the same command again to resume"], file=sys.stderr)
            return 130

    return main


def make_parser(doc: str | None) -> ArgumentParser:
    """Return a command's parser, whose help is its module's docstring, with examples as the user calls it."""
    text = doc or ""
    if sys.argv[0].startswith("hfprune "):
        text = re.sub(r"python launch/(\w+)\.py", lambda found: f"hfprune {found[1].replace('_', '-')}", text)
    return ArgumentParser(description=text, formatter_class=RawDescriptionHelpFormatter)


def _require_streams() -> None:
    """Let a command write whatever it has to say: to nowhere if it was started without output (``>&-``), and with
    escapes for what a terminal's encoding lacks, such as a model's name in Chinese.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  until the process ends
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _require_current_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one") from None


def path_given(argument: str) -> Path:
    """Argument type for what must be named: if empty, as of an unset variable, it would mean the current folder."""
    if not argument:
        raise UserError("an argument that names a file or folder is empty; give one (. for the current folder)")
    return expanded_path(argument)


def expanded_path(argument: str) -> Path:
    """Argument type for files and folders: shells leave the ``~`` in ``--out=~/runs`` as it is."""
    expanded = os.path.expanduser(argument)  # noqa: PTH111  pathlib drops the ./ of a file ./~name
    if expanded.startswith("~"):
        raise UserError(f"{argument}: no such user; for a file of that name, write ./{argument}")
    return Path(expanded)

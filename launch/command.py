"""The frame around every command: an error that the user can fix is one message, and Ctrl-C shows no traceback.

This holds from the start, since this module imports next to nothing and commands import what they need within ``run``.
"""

from __future__ import annotations

import functools
import io
import os
import re
import sys
from argparse import Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError, explained

SIGPIPE_EXIT_CODE = 141  # what a shell reports for a program ended by SIGPIPE


def command(body: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorator of a command's ``main``, which gets the arguments, by default those of this process."""

    @functools.wraps(body)
    def main(argv: Sequence[str] | None = None) -> int:
        return run(lambda: body(argv))

    return main


def run(body: Callable[[], int], when_interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code.

    Args:
        when_interrupted: message for when the user interrupts it.
    """
    _require_streams()
    try:
        with explained():
            _require_own_packages()
            code = body()
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SIGPIPE_EXIT_CODE
    except KeyboardInterrupt as interruption:
        print(*interruption.args or [when_interrupted], file=sys.stderr)
        return 130


def make_parser(doc: str | None) -> ArgumentParser:
    """Return the parser of a command, whose help is the docstring of its module."""
    return ArgumentParser(description=as_called(doc or ""), formatter_class=RawDescriptionHelpFormatter)


def as_called(examples: str) -> str:
    """Return examples of commands as sub-commands of ``hfprune`` if the command was started as one of these."""
    if not sys.argv[0].startswith("hfprune "):
        return examples
    return re.sub(r"python launch/(\w+)\.py", lambda found: f"hfprune {found[1].replace('_', '-')}", examples)


def _require_streams() -> None:
    """Let a command write whatever it has to say: to nowhere if it was started without output (``>&-``), and with
    escapes for what a terminal's encoding lacks, such as a model's name in Chinese.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Open until the process ends.
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


class ListAction(Action):
    """Adds up the items of a comma-separated flag that is given several times, as ``--ratios 0.1 --ratios 0.2``."""

    def __call__(self, _parser: object, namespace: Namespace, values: Any, _option: object = None) -> None:
        """Append to the items given so far."""
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is None else f"{given},{values}")


def folder(argument: str) -> Path:
    """Argument type for folders.

    Raises:
        UserError: for an empty argument, e.g. from an unset shell variable; it would mean the current folder.
    """
    if not argument:
        raise UserError("an argument that names a folder is empty; give a folder (. for the current one)")
    return place(argument)


def place(argument: str) -> Path:
    """Argument type for files and folders: shells leave the ``~`` in ``--out=~/runs`` as it is.

    Raises:
        UserError: for the home of a user who doesn't exist.
    """
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise UserError(f"{argument!r}: not a valid path ({error})") from None


def _require_own_packages() -> None:
    """Refuse to run the script of one copy of the project with the packages of another, since edits in the first would
    go unnoticed: so it is in a second clone if the environment of the first is active. Nor does one run in a folder
    that is gone.
    """
    try:
        script, packages = Path.cwd() / sys.argv[0], Path(__file__).resolve().parent
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one") from None
    launch, copy = script.parent, script.parent.parent
    is_of_project = script.is_file() and (launch / "setup.sh").is_file() and (copy / "hfprune_dist").is_dir()
    if is_of_project and not launch.samefile(packages):
        raise UserError(
            f"{sys.argv[0]} is in {copy}, but this Python ({sys.executable}) has the project's packages from "
            f"{packages.parent}; activate the environment of {copy}, or make one: "
            f"bash -c 'source {launch / 'setup.sh'}'"
        )

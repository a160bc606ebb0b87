"""The frame around every command: an error that the user can fix is one message, and Ctrl-C shows no traceback.

This holds from the start, since this module imports next to nothing and commands import what they need within ``run``.
"""

from __future__ import annotations

import io
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

from hfprune_dist.errors import UserError, explained

SIGPIPE_EXIT_CODE = 141  # what a shell reports for a program ended by SIGPIPE


def run(body: Callable[[], int], when_interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code.

    Args:
        when_interrupted: message for when the user interrupts it.
    """
    _require_streams()
    try:
        with explained():
            _require_current_folder()
            _require_own_packages()
            code = body()
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        discard_output()
        return SIGPIPE_EXIT_CODE
    except KeyboardInterrupt:
        print(when_interrupted, file=sys.stderr)
        return 130


def discard_output() -> None:
    """Let all further output go nowhere, since its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_parser(doc: str | None) -> ArgumentParser:
    """Return the parser of a command, whose help is the docstring of its module.

    If the command was started as a sub-command of ``hfprune``, so are the commands in its examples.
    """
    if sys.argv[0].startswith("hfprune "):
        doc = re.sub(r"python launch/(\w+)\.py", lambda found: f"hfprune {found[1].replace('_', '-')}", doc or "")
    return ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)


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
    go unnoticed: so it is in a second clone if the environment of the first is active.
    """
    script, packages = Path(sys.argv[0]).absolute(), Path(__file__).resolve().parent
    launch, copy = script.parent, script.parent.parent
    is_of_project = script.is_file() and (launch / "setup.sh").is_file() and (copy / "hfprune_dist").is_dir()
    if is_of_project and not launch.samefile(packages):
        raise UserError(
            f"{sys.argv[0]} is in {copy}, but this Python ({sys.executable}) has the project's packages from "
            f"{packages.parent}; activate the environment of {copy}, or make one: "
            f"bash -c 'source {launch / 'setup.sh'}'"
        )


def _require_current_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one") from None

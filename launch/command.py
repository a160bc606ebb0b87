"""The frame around every command: an error that the user can fix is one message, and Ctrl-C shows no traceback.

This holds from the start, since this module imports next to nothing and commands import what they need within ``run``.
"""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from argparse import Action, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfprune_launch.installed import how_to_activate

import hfprune_dist
from hfprune_dist.errors import UserError, explained

SIGPIPE_EXIT_CODE = 141  # what a shell reports for a program ended by SIGPIPE


def run(body: Callable[[], int], when_interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code.

    Args:
        when_interrupted: message for when the user interrupts it.
    """
    _require_streams()
    try:
        with explained(), _packages_explained():
            _require_current_folder()
            _require_own_packages()
            code = body()
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader of the output, such as head, has seen enough
        discard_output()
        return SIGPIPE_EXIT_CODE
    except KeyboardInterrupt as interruption:
        print(*interruption.args or [when_interrupted], file=sys.stderr)
        return 130


@contextmanager
def _packages_explained() -> Iterator[None]:
    """Turn the error of a package that is missing, or breaks while it is imported, into one that says what to do."""
    try:
        yield
    except Exception as error:
        package = _unusable_package(error)
        if package is None:
            raise
        path = os.environ.get("PYTHONPATH")
        other = f"PYTHONPATH ({path}) may hold another one: unset it, or " if path else ""
        raise UserError(
            f"{package} can't be imported by {sys.executable} ({type(error).__name__}: {error}); "
            f"{other}{how_to_activate()}"
        ) from None


def _unusable_package(error: Exception) -> str | None:
    """The package, or the file of one, whose import raised an error; None if something else did, or it is ours."""
    if isinstance(error, ImportError) and error.name and not error.name.startswith("hfprune_"):
        return error.name.partition(".")[0]
    ours = [Path(__file__).resolve().parent, Path(hfprune_dist.__file__).resolve().parent]
    imported = (Path(it.filename) for it in traceback.extract_tb(error.__traceback__) if it.name == "<module>")
    return next((str(it) for it in imported if not {*ours}.intersection(it.resolve().parents)), None)


def discard_output() -> None:
    """Let all further output go nowhere, since its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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

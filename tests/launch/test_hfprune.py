"""The command hfprune: its sub-commands are the project's commands, and it answers at once."""

import importlib
import io
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from hfprune_launch import hfprune, start
from hfprune_launch.command import command
from sweeps import in_process


@pytest.fixture(autouse=True)
def called(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hfprune"])


def test_every_command_is_one_of_its_own():
    scripts = {path.stem for path in Path(hfprune.__file__).parent.glob("*.py") if "__main__" in path.read_text()}
    assert {name.replace("-", "_") for name in hfprune.COMMANDS} == scripts - {"hfprune"}


@pytest.mark.parametrize("name", hfprune.COMMANDS)
def test_a_sub_command_has_the_help_of_its_command_with_its_own_name(name):
    code, shown, _ = in_process(hfprune.main, name, "--help")
    assert code == 0 and shown.startswith(f"usage: hfprune {name} ")
    assert "launch/" not in shown, "examples are those of hfprune"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no command; valid: sweep"),
        (["swep", "--dry-run"], "no command 'swep'; did you mean 'sweep'?"),
    ],
)
def test_bad_input_is_one_message(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, said = in_process(hfprune.main, *arguments)
    assert code == 2 and expected in said and not list(tmp_path.iterdir())


def test_an_interruption_while_a_command_is_imported_shows_no_traceback(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        start.start("launch/sweep.py")


def test_what_a_terminal_can_not_show_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert command(lambda _: print("\u6a21 \xb1 \udcff") or 0)() == 0
    assert stream.buffer.getvalue() == b"\\u6a21 \\xb1 \\udcff\n"

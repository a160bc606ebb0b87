"""Tables as a terminal shows them."""

import io
import re
import sys
import unicodedata

import pytest
from hfprune_launch import screen
from hfprune_launch.screen import StageScreen, make_console, show_results
from made_stages import stage_of
from rich.console import Console
from rows import efficiency, missing, row_of

from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Input

USUAL = [row_of(ratio=0.0, recovery="none", kl=0.0), row_of(), row_of(method="hfprune", kl=4.597)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """Return a function that shows something on a terminal of 80 columns and returns its lines without colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")

    def shown(show, *arguments, **options):
        monkeypatch.setattr(sys, "stdout", Terminal())
        show(make_console(), *arguments, **options)
        return re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue()).splitlines()

    return shown


def width_of(line):
    """Return how many columns a line occupies."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in line)


@pytest.mark.parametrize("is_piped", [False, True])
def test_a_table_fits_80_columns_with_its_names_whole_and_has_three_lines_of_notes(on_terminal, capsys, is_piped):
    model, timed = "llama-3.2-1b", {"decode_speed": 1.2, "efficiency": efficiency(1.2, 3.0, 0.1)}
    rows = [row | {"model": model} | timed for row in USUAL]
    if is_piped:
        show_results(make_console(), rows)
        lines = capsys.readouterr().out.splitlines()
    else:
        lines = on_terminal(show_results, rows)
    assert max(map(width_of, lines)) <= 80
    assert [line.split()[:4] for line in lines[:4]] == [
        ["model", "ratio", "method", "recovery"],
        [model, "dense", "-", "none"],
        [model, "0.2", "surgeon-plain", "lora"],
        [model, "0.2", "hfprune", "lora"],
    ]
    assert "size" not in lines[0] and "time" in lines[0], "a column that has no room is left out"
    assert len(lines) <= 4 + 3 and "lower is better" in lines[4] and "report.py --wide" in lines[-1]


@pytest.mark.parametrize("name", ["模型" * 20, "a/b[x]-" * 9])
def test_no_line_is_longer_than_the_terminal(on_terminal, name):
    rows = [row_of(name), missing(row_of(name, method=name)), row_of(name, tasks={name: {"acc": 0.5}})]
    lines = on_terminal(show_results, rows)
    # Messages are not wrapped, as they contain paths to copy.
    assert max(width_of(line) for line in lines if not line.startswith(("missing: ", "not to be "))) <= 80
    assert sum(line.startswith("missing: ") for line in lines) == 1


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_sweep_shows_the_stage_at_work_and_when_it_ends(is_terminal, monkeypatch):
    monkeypatch.setattr(screen, "LINE_INTERVAL_S", 0.0)
    stage = stage_of("importance", "a", {}, {"model": Input("digest", "/x")})
    console = Console(file=io.StringIO(), width=120, force_terminal=is_terminal, color_system=None)
    shown = StageScreen(console, 2)
    with shown.live:
        shown.beat(stage, Heartbeat("calibration", 5, 9, 100.0, 40.0, 2))
        shown.end(stage, "failed", " (0.0 s)\n  torch[cuda] is lost")
    text = console.file.getvalue()
    assert "importance a: calibration 5/9, 80s left" in text and ("\x1b[2K" in text) == is_terminal
    assert "calibration" not in text.partition("failed")[2], "no stage is at work any more"
    assert "[1/2] failed importance a (0.0 s)\n  torch[cuda] is lost\n" in text

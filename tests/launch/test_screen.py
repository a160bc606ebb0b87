"""Tables as a terminal shows them."""

import io
import re

import pytest
from hfprune_launch import screen
from hfprune_launch.screen import StageScreen, show_results
from made_stages import stage_of
from rich.console import Console
from rows import efficiency, row_of

from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Input

USUAL = [row_of(ratio=0.0, recovery="none", kl=0.0), row_of(), row_of(method="hfprune", kl=4.597)]


def console_of(width, is_terminal):
    return Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_table_fits_80_columns_with_its_names_whole_and_has_three_lines_of_notes(is_terminal):
    model, timed = "llama-3.2-1b", {"decode_speed": 1.2, "efficiency": efficiency(1.2, 3.0, 0.1)}
    console = console_of(80 if is_terminal else 400, is_terminal)
    show_results(console, [row | {"model": model} | timed for row in USUAL])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:4] for line in lines[:4]] == [
        ["model", "ratio", "method", "recovery"],
        [model, "dense", "-", "none"],
        [model, "0.2", "surgeon-plain", "lora"],
        [model, "0.2", "hfprune", "lora"],
    ]
    assert "size" not in lines[0] and "time" in lines[0], "a column that has no room is left out"
    assert len(lines) <= 4 + 3 and "lower is better" in lines[4] and "report.py --wide" in lines[-1]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_sweep_shows_the_stage_at_work_and_when_it_ends(is_terminal, monkeypatch):
    monkeypatch.setattr(screen, "LINE_INTERVAL_S", 0.0)
    stage = stage_of("importance", "a", {}, {"model": Input("digest", "/x")})
    console = console_of(120, is_terminal)
    shown = StageScreen(console, 2)
    with shown.live:
        shown.beat(stage, Heartbeat("calibration", 5, 9, 100.0, 40.0, 2))
        shown.end(stage, "failed", " (0.0 s)\n  torch[cuda] is lost")
    text = console.file.getvalue()
    assert "importance a: calibration 5/9, 80s left" in text and ("\x1b[2K" in text) == is_terminal
    assert "calibration" not in text.partition("failed")[2], "no stage is at work any more"
    assert "[1/2] failed importance a (0.0 s)\n  torch[cuda] is lost\n" in text

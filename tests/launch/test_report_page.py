"""When report.html is written; nothing depends on it."""

import io

import hfprune_launch.modes.report_page as report_page
import pytest
from drawn_sweep import DrawnSweep
from hfprune_launch import report
from hfprune_launch.modes.report_page import REPORT, ReportPage
from hfprune_launch.sweep_folder import Sweep
from rich.console import Console
from sweeps import in_process

from hfprune_dist.store.artifacts import Store


@pytest.fixture
def drawn(tmp_path):
    sweep = DrawnSweep(tmp_path / "out")
    Sweep(sweep.plan, Store(sweep.out / "store"), sweep.out, sweep.dense).write_record()
    return sweep


def test_it_is_rewritten_at_most_every_half_minute_and_at_the_end(drawn):
    now, file = 100.0, drawn.out / REPORT
    page = ReportPage(drawn.out, Console(), lambda: now)
    page.refresh()
    first = file.read_text()
    assert first.startswith("<!doctype html>") and first.rstrip().endswith("</html>")
    file.unlink()
    now += 29.0
    page.refresh()
    assert not file.exists()
    now += 1.0
    page.refresh()
    assert file.exists()
    file.unlink()
    page.write()
    assert file.exists() and [*drawn.out.glob(".*")] == []


def test_one_that_cannot_be_written_ends_nothing(drawn, monkeypatch):
    said = io.StringIO()
    (drawn.out / REPORT).mkdir()
    ReportPage(drawn.out, Console(file=said)).write()
    monkeypatch.setattr(report_page, "collect", lambda *_: {}["broken"])
    ReportPage(drawn.out, Console(file=said)).write()
    first, second = said.getvalue().splitlines()
    assert "can't be written" in first and "can't be written" in second and "broken" in second


def test_report_writes_it_and_nothing_lies_where_no_sweep_has_run(drawn, tmp_path):
    code, shown, _ = in_process(report.main, drawn.out)
    assert code == 0 and "m 0.5" in (drawn.out / REPORT).read_text() and "can't" not in shown
    ReportPage(tmp_path / "other", Console()).write()
    assert not (tmp_path / "other").exists()

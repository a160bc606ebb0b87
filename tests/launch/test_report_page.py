"""When report.html is written; nothing depends on it."""

import io

import pytest
from drawn_sweep import DrawnSweep
from hfprune_launch import report
from hfprune_launch.sweep_folder import REPORT, Sweep, write_page
from rich.console import Console
from sweeps import in_process

from hfprune_dist.report import page
from hfprune_dist.store.artifacts import Store


@pytest.fixture
def drawn(tmp_path):
    sweep = DrawnSweep(tmp_path / "out")
    Sweep(sweep.plan, Store(sweep.out / "store"), sweep.out, sweep.dense).write_record()
    return sweep


def test_one_that_cannot_be_written_ends_nothing(drawn, monkeypatch):
    said = io.StringIO()
    (drawn.out / REPORT).mkdir()
    write_page(drawn.out, Console(file=said))
    monkeypatch.setattr(page, "Ledger", lambda *_: {}["broken"])
    write_page(drawn.out, Console(file=said))
    first, second = said.getvalue().splitlines()
    assert "can't be written" in first and "can't be written" in second and "broken" in second


def test_report_writes_it_and_nothing_lies_where_no_sweep_has_run(drawn, tmp_path):
    code, shown, _ = in_process(report.main, drawn.out)
    assert code == 0 and "m 0.5" in (drawn.out / REPORT).read_text() and "can't" not in shown
    write_page(tmp_path / "other", Console())
    assert not (tmp_path / "other").exists()

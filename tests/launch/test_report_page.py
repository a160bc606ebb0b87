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


def test_it_is_written_by_report_and_ends_nothing_if_it_can_not_be(drawn, monkeypatch):
    code, shown, _ = in_process(report.main, drawn.out)
    assert code == 0 and "m 0.5" in (drawn.out / REPORT).read_text() and "can't" not in shown
    said = io.StringIO()
    monkeypatch.setattr(page, "Ledger", lambda *_: {}["broken"])
    write_page(drawn.out, Console(file=said))
    assert "can't be written (KeyError: 'broken')" in said.getvalue()

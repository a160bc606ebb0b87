"""When report.html is written; nothing depends on it."""

import io
import json
import math

import hfprune_launch.modes.report_page as report_page
import pytest
from drawn_sweep import DrawnSweep
from hfprune_launch import report
from hfprune_launch.modes.report_page import REPORT, ReportPage
from hfprune_launch.sweep_folder import Record, read_record, write_record
from rich.console import Console
from sweeps import in_process

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import Plan


@pytest.fixture
def drawn(tmp_path):
    sweep = DrawnSweep(tmp_path / "out")
    write_record(sweep.out, Record(sweep.plan, sweep.dense))
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


@pytest.mark.parametrize("lost", ["model", "prune"])
def test_a_record_that_lacks_what_its_rows_are_made_of_is_damaged(drawn, lost):
    file = drawn.out / "sweep.json"
    record = json.loads(file.read_text())
    if lost == "model":
        record["dense"].clear()
    else:
        plan = drawn.plan
        stages = {id: stage for id, stage in plan.stages.items() if stage.kind != lost}
        record |= Plan(stages, plan.cells).to_json()
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"sweep\.json: damaged; run the sweep again"):
        read_record(drawn.out)


@pytest.mark.parametrize("other", ["text", math.nan], ids=str)
def test_a_record_of_other_values_is_damaged_or_shown(drawn, other):
    """Some values may be null, and a number that is another one can't be told from it."""
    file, record = drawn.out / "sweep.json", json.loads((drawn.out / "sweep.json").read_text())
    dense, pruned = record["cells"][0], record["cells"][2]
    for values in (dense, pruned, record["dense"]["m"]):
        for key, value in [*values.items()]:
            values[key] = other
            file.write_text(json.dumps(record))
            values[key] = value
            code, _, said = in_process(report.main, drawn.out)
            assert code == 0 or (code == 2 and "sweep.json: damaged; run the sweep again" in said), (key, said)


def test_report_writes_it_and_nothing_lies_where_no_sweep_has_run(drawn, tmp_path):
    code, shown, _ = in_process(report.main, drawn.out)
    assert code == 0 and "m 0.5" in (drawn.out / REPORT).read_text() and "can't" not in shown
    ReportPage(tmp_path / "other", Console()).write()
    assert not (tmp_path / "other").exists()

"""The tables of a folder in which several commands end at the same time."""

import threading

from hfprune_launch import sweep_folder
from hfprune_launch.sweep_folder import Sweep
from rich.console import Console

from hfprune_dist.planning.plan import Plan


def test_no_older_rows_are_written_last(store, tmp_path, monkeypatch):
    """The first command has read its rows when the second one, which reads more, begins."""
    state, order, slow = ["old"], [], threading.Event()

    def rows(_):
        found = [*state]
        if state == ["old"]:
            slow.set()
            state.append("new")
            threading.Event().wait(0.3)
        return found

    monkeypatch.setattr(Sweep, "rows", rows)
    monkeypatch.setattr(sweep_folder, "write_reports", lambda found, _: order.append(found))
    for name in ("show_results", "show_checkpoints"):
        monkeypatch.setattr(sweep_folder, name, lambda *_: None)
    folder = Sweep(Plan({}, ()), store, tmp_path)
    first = threading.Thread(target=folder.write_results, args=(Console(),))
    first.start()
    slow.wait()
    written = folder.write_results(Console())
    first.join()
    assert order == [["old"], ["old", "new"]]
    assert "report.html" not in written, "a folder without a sweep has no report"

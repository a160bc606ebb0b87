from pathlib import Path

import pytest

from hfprune_dist.results.markdown import cells
from hfprune_dist.results.published import PublishedTable, read_published

TABLES = read_published(Path(__file__).parents[2] / "configs" / "published.yaml")


@pytest.mark.parametrize("table", TABLES, ids=lambda it: it.title)
def test_what_papers_report(table):
    """No more is removed than the ratio that the paper gives, and an average is that of its tasks."""
    for row in table.rows:
        assert row.get("removed", 0) <= row.get("ratio", 0) and len(row["scores"]) == len(table.columns)
        if tasks := row.get("of_tasks"):
            assert row["scores"][0] == pytest.approx(sum(tasks) / len(table.tasks), abs=0.06)


def test_figures_are_shown_as_printed_and_what_a_paper_leaves_out_is_a_dash():
    rows = [
        {"method": "dense", "scores": [12, 68.3], "of_tasks": [70.1]},
        {"method": "mine", "ratio": 0.2, "removed": 0.195, "recovery": "lora", "scores": [None, 60]},
    ]
    table = PublishedTable("t", "p", ["ppl", "avg"], rows, ["piqa"])
    shown = cells(table.rows, table.shown(wide=True))
    assert shown[0] == ["dense", "dense", "-", "none", "70.1", "12", "68.3"]
    assert shown[1] == ["mine", "0.2", "0.195", "lora", "-", "-", "60"]

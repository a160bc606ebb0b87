from pathlib import Path

import pytest
from pydantic import ValidationError

from hfprune_dist.results.markdown import cells
from hfprune_dist.results.published import PublishedTable, read_published

TABLES = read_published(Path(__file__).parents[2] / "configs" / "published.yaml")


@pytest.mark.parametrize("table", TABLES, ids=lambda it: it.title)
def test_what_papers_report(table):
    """Every table has a source and a way of measuring; no more is removed than the ratio that the paper gives."""
    assert table.protocol and any(mark in table.title for mark in ("arXiv", "ICML", "Tyr"))
    assert all(row.removed is None or row.removed <= row.ratio for row in table.rows)
    names = [(row.method, row.ratio, row.recovery) for row in table.rows]
    assert len(set(names)) == len(names)
    averaged = [(row.scores[0], row.of_tasks) for row in table.rows if row.of_tasks]
    assert all(average == pytest.approx(sum(tasks) / len(tasks), abs=0.06) for average, tasks in averaged)


@pytest.mark.parametrize("scores", [[], [1.0, 2.0]])
def test_rows_that_miss_their_columns_are_refused(scores):
    whole, row = {"method": "dense", "scores": [3.0]}, {"method": "mine", "scores": scores}
    with pytest.raises(ValidationError, match="more or fewer scores"):
        PublishedTable.model_validate({"title": "t", "protocol": "p", "columns": ["avg"], "rows": [whole, row]})


def test_figures_are_shown_as_printed_and_what_a_paper_leaves_out_is_a_dash():
    rows = [
        {"method": "dense", "scores": [12, 68.30], "of_tasks": [70.1]},
        {"method": "mine", "ratio": 0.2, "removed": 0.195, "recovery": "lora", "scores": [None, 60]},
    ]
    table = {"title": "t", "protocol": "p", "columns": ["ppl", "avg"], "tasks": ["piqa"], "rows": rows}
    shown = cells((made := PublishedTable.model_validate(table)).rows, made.shown(wide=True))
    assert shown[0] == ["dense", "dense", "-", "none", "70.1", "12", "68.3"]
    assert shown[1] == ["mine", "0.2", "0.195", "lora", "-", "-", "60"]

from pathlib import Path

import pytest
from pydantic import ValidationError

from hfprune_dist.results.column import cells
from hfprune_dist.results.published import PublishedTable, read_published

FILE = Path(__file__).parents[2] / "configs" / "published.yaml"
TABLES = read_published(FILE)


@pytest.mark.parametrize("table", TABLES, ids=lambda it: it.title)
def test_what_papers_report(table):
    """Every table has a source and a way of measuring; no more is removed than the ratio that the paper gives."""
    assert table.protocol and any(mark in table.title for mark in ("arXiv", "ICML", "Tyr"))
    assert all(row.removed is None or row.removed <= row.ratio for row in table.rows)
    names = [(row.method, row.ratio, row.recovery) for row in table.rows]
    assert len(set(names)) == len(names)
    for wide in (False, True):
        columns = table.shown(wide)
        trained = any(row.recovery != "none" for row in table.rows)
        assert len(columns) == 3 + trained + len(table.columns) + wide * len(table.tasks)
        assert all("" not in line for line in cells(table.rows, columns))


def test_averages_of_tasks_are_the_printed_ones():
    for row in TABLES[0].rows:
        if row.of_tasks:
            assert row.scores[0] == pytest.approx(sum(row.of_tasks) / len(row.of_tasks), abs=0.06)


def test_all_ratios_of_the_decoders_matrices_are_shown_as_shares_of_all_parameters():
    """LLaMA-7B has 32 layers of 202,375,168 weights, and 6,738,415,616 parameters."""
    rows = [row for table in TABLES if table.title.startswith("LLaMA-7B") for row in table.rows]
    of_decoder = [row for row in rows if row.method in ("FLAP", "Wanda-sp", "LoRAP")]
    assert {row.ratio for row in of_decoder} == {0.2, 0.3, 0.5}
    assert all(row.removed == round(row.ratio * 32 * 202375168 / 6738415616, 3) for row in of_decoder)


def test_unsound_rows_are_left_out():
    """LoRAPrune's row in the first paper's table lists one task's score twice."""
    assert "LoRAPrune" not in {row.method for row in TABLES[0].rows}


@pytest.mark.parametrize("scores", [[], [1.0, 2.0]])
def test_rows_that_miss_their_columns_are_refused(scores):
    whole, row = {"method": "dense", "scores": [3.0]}, {"method": "mine", "scores": scores}
    with pytest.raises(ValidationError, match="more or fewer scores"):
        PublishedTable.model_validate({"title": "t", "protocol": "p", "columns": ["avg"], "rows": [whole, row]})


@pytest.mark.parametrize("table", TABLES, ids=lambda it: it.title)
def test_scores_are_numbers_and_what_names_a_row_is_text(table):
    texts = {column.header for column in table.shown(wide=True) if column.is_text}
    assert texts - {"recovery"} == {"published", "ratio", "of all"}
    assert ("recovery" in texts) == any(row.recovery != "none" for row in table.rows)


def test_figures_are_shown_as_printed_and_what_a_paper_leaves_out_is_a_dash():
    rows = [
        {"method": "dense", "scores": [12, 68.30], "of_tasks": [70.1]},
        {"method": "mine", "ratio": 0.2, "removed": 0.195, "recovery": "lora", "scores": [None, 60]},
    ]
    table = {"title": "t", "protocol": "p", "columns": ["ppl", "avg"], "tasks": ["piqa"], "rows": rows}
    shown = cells((made := PublishedTable.model_validate(table)).rows, made.shown(wide=True))
    assert shown[0] == ["dense", "dense", "-", "none", "70.1", "12", "68.3"]
    assert shown[1] == ["mine", "0.2", "0.195", "lora", "-", "-", "60"]

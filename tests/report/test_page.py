"""The page as text: what it contains, whatever things are called and whatever is missing."""

import csv
import json
import math
from html.parser import HTMLParser

import pytest
from drawn_sweep import BEGIN, DrawnSweep, made
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.report import charts
from hfprune_dist.report import page as page_module
from hfprune_dist.results.table import write_reports

ODD = ["<script>alert(1)</script>", "a\"b'c&amp;<b>", "%{x} ${y} </script><!--", "--method=x y"]


class Parsed(HTMLParser):
    """Elements of a page, its table's values by column, and its figures."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.ids, self.addresses, self.columns, self.lines, self.texts = 0, [], [], [], [], []
        self._in_table = self._in_figures = False
        self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.scripts += tag == "script"
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        self._in_figures = attributes.get("id") == "figures"
        self._in_table = attributes.get("id") == "rows" if tag == "table" else self._in_table
        if self._in_table and tag == "button":
            self.columns.append(attributes["title"])
        if self._in_table and tag == "tr":
            self.lines.append([])
        if self._in_table and tag == "td":
            self._cell = attributes.get("data-v")
            self.lines[-1].append(self._cell or "")

    def handle_data(self, data):
        self.texts.append(data)
        if self._in_figures:
            self.figures = json.loads(data)
        if self._in_table and self.lines[-1:] and self.lines[-1] and self._cell is None:
            self.lines[-1][-1] += data

    def handle_endtag(self, tag):
        self._in_figures = False
        self._in_table = self._in_table and tag != "table"
        self._cell = "" if tag == "td" else self._cell

    @property
    def rows(self):
        return [dict(zip(self.columns, line, strict=True)) for line in self.lines if line]


@pytest.fixture(autouse=True)
def without_library(monkeypatch):
    monkeypatch.setattr(page_module, "_plotly", lambda: "")


def test_the_table_has_every_number_of_results_csv(tmp_path):
    missing, tasks = {"n 0.5 other + lora"}, ("piqa", "arc")
    sweep = DrawnSweep(tmp_path, ["m", "n"], missing=missing, tasks=tasks, timed=True)
    write_reports(sweep.rows(), tmp_path)
    with (tmp_path / "results.csv").open(newline="") as stream:
        expected = list(csv.DictReader(stream))
    shown = Parsed(sweep.page()).rows
    assert len(shown) == len(expected) == 20
    assert [{column: row[column] for column in expected[0]} for row in shown] == expected


def test_figures_have_the_numbers_of_rows(tmp_path):
    sweep = DrawnSweep(tmp_path, tasks=("piqa", "arc"))
    parsed, rows = Parsed(sweep.page()), sweep.rows()
    drawn = {value for figure in parsed.figures for trace in figure["data"] for value in trace.get("y", [])}
    measured = {row[name] for row in rows for name in ("kl", "perplexity", "top1_agreement", "average")}
    measured |= {task["acc"] for row in rows for task in row["tasks"].values()}
    assert measured <= drawn
    bars = [trace["error_y"]["array"] for figure in parsed.figures for trace in figure["data"] if "error_y" in trace]
    assert {error for array in bars for error in array} == {None, 0.01, math.hypot(0.01, 0.01) / 2}
    assert {"quality", "tasks", "layers", "losses"} <= set(parsed.ids)


def test_names_are_text_whatever_is_in_them(tmp_path):
    odd, others = ODD[:2], ODD[2:]
    sweep = DrawnSweep(tmp_path / "<odd> & 'name'", odd, others, missing={f"{odd[0]} 0.2 {others[0]}"}, tasks=odd)
    (sweep.out / "config.yaml").write_text(f"models: {ODD}\n")
    attempts = {id: [made(1, BEGIN + 9, state="failed", message=ODD[0])] for id in sweep.plan.stages}
    text = sweep.page(attempts)
    parsed, plain = Parsed(text), Parsed(DrawnSweep(tmp_path / "plain").page())
    assert parsed.scripts == plain.scripts and "alert(1)</script>" not in text
    assert {row["label"] for row in parsed.rows} == {cell.label for cell in sweep.plan.cells}
    for name in ODD[:3]:
        assert any(name in said for said in parsed.texts), name
    # plotly.js interprets some HTML in names.
    names = {trace.get("name", "") for figure in parsed.figures for trace in figure["data"]}
    assert not any("<" in name for name in names) and any("&lt;/script&gt;" in name for name in names)


def test_what_is_missing_or_measured_in_another_way_is_named_above_the_charts(tmp_path):
    sweep = DrawnSweep(tmp_path, missing={"m 0.5 other"})
    rows = [dict(row, measured_as="a") for row in sweep.rows()]
    rows[-1]["measured_as"] = "b"
    parsed = Parsed(sweep.page(rows=rows))
    assert "missing: m 0.5 other: evaluate has not run yet" in parsed.texts
    assert any(f"measured in another way: {rows[-1]['label']}" in it for it in parsed.texts)
    assert [row["label"] for row in parsed.rows if row["status"] == "missing"] == ["m 0.5 other"]


def test_links_are_relative_and_nothing_else_is_asked_for(tmp_path):
    sweep = DrawnSweep(tmp_path / "a b")
    log = sweep.out / "logs" / "prune 1.log"
    failed = {"state": "failed", "logs": (log,)}
    text = sweep.page({id: [made(1, BEGIN + 1, **failed)] for id in sweep.plan.stages})
    addresses = Parsed(text).addresses
    assert "logs/prune%201.log" in addresses and "default-src 'none'" in text
    assert {f"store/{cell.producers[-1]}" for cell in sweep.plan.cells if cell.producers} <= set(addresses)
    assert all(address.startswith(("#", "data:", "store/", "logs/")) for address in addresses)


# The data that charts are drawn from.


@given(st.lists(st.sampled_from([0.5, math.nan, math.inf, None]), max_size=1000))
def test_losses_are_thinned_to_their_end_and_those_that_are_not_finite_left_out(tmp_path_factory, losses):
    file = tmp_path_factory.mktemp("loss") / "loss.jsonl"
    assert charts.training_losses(file) == {}, "removed to make room"
    file.write_text("".join(json.dumps({"step": step, "loss": it}) + "\n" for step, it in enumerate(losses, 1)))
    found, finite = charts.training_losses(file), [step for step, it in enumerate(losses, 1) if it == 0.5]
    assert len(found) <= charts.MOST_POINTS + 1 and set(found.values()) <= {0.5}
    assert [*found][:1] == finite[:1] and [*found][-1:] == finite[-1:]

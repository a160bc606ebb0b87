"""The page as text: what it contains, whatever things are called and whatever is missing."""

import csv
import json
import math
from collections import Counter
from html.parser import HTMLParser

from drawn_sweep import DrawnSweep
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.report import charts
from hfprune_dist.results.metrics import headline
from hfprune_dist.results.table import write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Failure

ODD = ["<script>alert(1)</script>", "a\"b'c&amp;<b>", "%{x} ${y} </script><!--", "--method=x y"]


class Parsed(HTMLParser):
    """Elements of a page, its table's values by column, and what its charts say of lines and points."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.addresses, self.columns, self.lines = Counter(), [], [], [], []
        self.texts, self.notes, self.tooltips = [], {}, []
        self._in_table, self._cell, self._in = False, None, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags[tag] += 1
        self._in = {"title": tag, "br": self._in}.get(tag, attributes.get("class", ""))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
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
        self.notes[self._in] = self.notes.get(self._in, "") + data
        self.tooltips += [data] if self._in == "title" else []
        if self._in_table and self.lines[-1:] and self.lines[-1] and self._cell is None:
            self.lines[-1][-1] += data

    def handle_endtag(self, tag):
        self._in_table = self._in_table and tag != "table"
        self._cell = "" if tag == "td" else self._cell

    @property
    def rows(self):
        return [dict(zip(self.columns, line, strict=True)) for line in self.lines if line]


def test_the_table_has_every_number_of_results_csv(tmp_path):
    missing, tasks = {"n 0.5 other + lora"}, ("piqa", "arc")
    sweep = DrawnSweep(tmp_path, ["m", "n"], missing=missing, tasks=tasks, timed=True)
    write_reports(sweep.rows(), tmp_path)
    with (tmp_path / "results.csv").open(newline="") as stream:
        expected = list(csv.DictReader(stream))
    shown = Parsed(sweep.page()).rows
    assert len(shown) == len(expected) == 20
    assert [{column: row[column] for column in expected[0]} for row in shown] == expected


def test_charts_have_the_numbers_of_rows(tmp_path):
    sweep = DrawnSweep(tmp_path, tasks=("piqa", "arc"))
    parsed = Parsed(sweep.page())
    pruned = [row for row in sweep.rows() if row["ratio"]]
    for row in pruned:
        name, size = row["method"] + (" + lora" if row["recovery"] == "lora" else ""), row["parameters"]
        assert f"{name}: {size}, {row['kl']:.3g}" in parsed.tooltips
        for value, error in ((row["average"], row["average_stderr"]), *map(headline, row["tasks"].values())):
            assert f"{name}: {size}, {100 * value:.3g}%±{100 * error:.3g}%" in parsed.tooltips
    points = sum(": " in told for told in parsed.tooltips[1:])
    assert points == len(pruned) * 6, "KL on two texts, agreement, an average of two tasks"
    assert {"quality", "tasks", "layers", "losses"} <= set(parsed.ids)
    assert parsed.ids.index("quality") < parsed.ids.index("rows") < parsed.ids.index("tasks")


def test_no_chart_is_without_points_and_no_name_in_a_legend_without_a_line(tmp_path):
    plan = DrawnSweep(tmp_path).plan
    missing = {cell.label for cell in plan.cells if cell.ratio or cell.recovery == "lora"}
    parsed = Parsed(DrawnSweep(tmp_path / "dense", missing=missing).page())
    assert "quality" not in parsed.ids and "tasks" not in parsed.ids
    figures = DrawnSweep(tmp_path / "one", missing=missing - {"m 0.2 other + lora"}).page().split("<figure>")
    for figure in figures[1:]:
        assert figure.count("<polyline") == figure.count("<svg class=key") > 0
    assert sum("<circle" in figure for figure in figures) == 5 and figures[1].count("<polyline") == 2


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e9))
def test_an_axis_has_a_few_ticks_within_its_range(low, span):
    found = charts.ticks(low, low + span)
    assert 2 <= len(found) <= 6 and low - 1e-9 * span <= found[0] and found[-1] <= low + span * (1 + 1e-9)


def test_names_are_text_whatever_is_in_them(tmp_path):
    odd, others = ODD[:2], ODD[2:]
    sweep = DrawnSweep(tmp_path / "<odd> & 'name'", odd, others, missing={f"{odd[0]} 0.2 {others[0]}"}, tasks=odd)
    (sweep.out / "config.yaml").write_text(f"models: {ODD}\n")
    sweep.fail(ODD[0])
    text = sweep.page()
    parsed, plain = Parsed(text), Parsed(DrawnSweep(tmp_path / "plain").page())
    assert parsed.tags["script"] == plain.tags["script"] == 1 and "alert(1)</script>" not in text
    assert {row["label"] for row in parsed.rows} == {cell.label for cell in sweep.plan.cells}
    for name in ODD[:3]:
        assert any(name in said for said in parsed.texts), name


def test_the_finding_comes_first_then_what_failed_or_is_missing(tmp_path):
    sweep = DrawnSweep(tmp_path, missing={"m 0.5 other", "m 0.5 hfprune"})
    failed = next(cell for cell in sweep.plan.cells if cell.label == "m 0.5 hfprune")
    store = Store(tmp_path / "store")
    store.work(failed.evaluate).mkdir(parents=True)
    store.handle(failed.evaluate).report_failure(Failure("input", "no such task", 0, 0.0))
    rows = [dict(row, measured_as="a") for row in sweep.rows()]
    rows[-1]["measured_as"] = "b"
    text = sweep.page(rows=rows)
    parsed, first = Parsed(text), text.index("<figure")
    assert parsed.notes["finding"].startswith("m: with 20 % removed, ") and text.index("<p class=finding>") < first
    assert parsed.notes["note failed"].strip() == "m 0.5 hfprune: evaluate failed (input): no such task"
    assert "m 0.5 other: evaluate has not run yet" in parsed.notes["note missing"]
    assert f"measured in another way: {rows[-1]['label']}" in parsed.notes["note missing"]
    assert [row["label"] for row in parsed.rows if row["status"] == "missing"] == ["m 0.5 other"]


def test_links_are_relative_and_nothing_else_is_asked_for(tmp_path):
    sweep = DrawnSweep(tmp_path / "a b")
    sweep.fail("no such text")
    text = sweep.page()
    addresses = Parsed(text).addresses
    logs = {f"logs/{stage_id.replace('/', '-')}.1.log" for stage_id in sweep.plan.stages}
    assert logs <= set(addresses) and "default-src 'none'" in text
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

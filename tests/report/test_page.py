"""The page as text: what it contains, whatever things are called and whatever is missing."""

import csv
import json
import math
import shutil
from html.parser import HTMLParser

import pytest
from browser import opened
from drawn_sweep import BEGIN, DrawnSweep, made

from hfprune_dist.planning.plan import Plan
from hfprune_dist.report import page as page_module
from hfprune_dist.report.charts import quality_charts
from hfprune_dist.report.evidence import collect
from hfprune_dist.report.page import page
from hfprune_dist.results.table import write_reports

ODD = ["<script>alert(1)</script>", "a\"b'c&amp;<b>", "%{x} ${y} </script><!--", "--method=x y"]
CHARTS = ["size", "distance", "tasks", "layers", "overlap", "losses", "timeline"]


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
        if self._in_table and tag == "th":
            self.columns.append("logs")
        if self._in_table and tag == "button":
            self.columns[-1] = attributes["title"]
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


def rows_of_csv(folder):
    with (folder / "results.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_table_has_every_number_of_results_csv(tmp_path):
    missing, tasks = {"n 0.5 other + lora"}, ("piqa", "arc")
    evidence = DrawnSweep(tmp_path, ["m", "n"], missing=missing, tasks=tasks, timed=True).evidence()
    write_reports(evidence.rows, tmp_path)
    expected, shown = rows_of_csv(tmp_path), Parsed(page(evidence)).rows
    assert len(shown) == len(expected) == 20
    assert [{column: row[column] for column in expected[0]} for row in shown] == expected


def test_stages_that_no_row_needs_any_more_are_not_waited_for(tmp_path):
    """What results were made from may be gone, or may be a different pass today."""
    sweep = DrawnSweep(tmp_path, missing={"m 0.5 other + lora"})
    importance = next(iter(sweep.plan.stages))
    shutil.rmtree(tmp_path / "store" / importance)
    stages = len(sweep.plan.stages)
    assert f"{stages - 2} of {stages - 1} stages made" in page(sweep.evidence())


def test_figures_have_the_numbers_of_rows(tmp_path):
    evidence = DrawnSweep(tmp_path, tasks=("piqa", "arc")).evidence()
    parsed = Parsed(page(evidence))
    drawn = {value for figure in parsed.figures for trace in figure["data"] for value in _flat(trace.get("y", []))}
    measured = {row[name] for row in evidence.rows for name in ("kl", "perplexity", "top1_agreement", "average")}
    measured |= {task["acc"] for row in evidence.rows for task in row["tasks"].values()}
    assert measured <= drawn
    bars = [trace["error_y"]["array"] for figure in parsed.figures for trace in figure["data"] if "error_y" in trace]
    assert {error for array in bars for error in array} == {None, 0.01, math.hypot(0.01, 0.01) / 2}
    assert set(CHARTS) <= set(parsed.ids)


def test_quality_is_drawn_against_speed_where_that_was_measured(tmp_path):
    """Dense models have speed 1, and are drawn as lines across the chart."""
    charts = quality_charts(DrawnSweep(tmp_path / "timed", timed=True).evidence())
    (speed,) = [it for it in charts if it.id == "speed"]
    for figure in speed.figures:
        xs = {trace["name"]: trace["x"] for trace in figure.data}
        assert xs["hfprune"] == xs["other + lora"] == pytest.approx([1.25, 2.0])
        assert xs["dense"] == xs["dense + lora"] == pytest.approx([1.0, 2.0])
    assert [figure.title for figure in speed.figures] == ["m: avg", "m: ppl (log)"]
    assert "speed" not in {it.id for it in quality_charts(DrawnSweep(tmp_path / "not").evidence())}


def test_scores_that_a_task_reports_in_percent_are_not_cut_off(tmp_path):
    """As f1 of lm-eval's scrolls_qasper: only shares have an axis of possible shares."""
    sweep = DrawnSweep(tmp_path, tasks=("piqa", "scrolls"))
    rows = [dict(row, tasks={**row["tasks"], "scrolls": {"f1": 61.2}}) for row in sweep.evidence().rows]
    (tasks,) = [it for it in quality_charts(collect(tmp_path, sweep.plan, rows, lambda _: (), 0.0)) if it.id == "tasks"]
    limits = {it.title: "autorangeoptions" in it.layout["yaxis"] for it in tasks.figures}
    assert limits == {"m: piqa": True, "m: scrolls": False}


def _flat(values):
    return [value for value in values if isinstance(value, float)]


def test_names_are_text_whatever_is_in_them(tmp_path):
    odd, others = ODD[:2], ODD[2:]
    sweep = DrawnSweep(tmp_path / "<odd> & 'name'", odd, others, missing={f"{odd[0]} 0.2 {others[0]}"}, tasks=odd)
    (sweep.out / "config.yaml").write_text(f"models: {ODD}\n")
    attempts = {id: [made(1, BEGIN, BEGIN + 9, state="failed", message=ODD[0])] for id in sweep.plan.stages}
    text = page(sweep.evidence(attempts))
    parsed, plain = Parsed(text), Parsed(page(DrawnSweep(tmp_path / "plain").evidence()))
    assert parsed.scripts == plain.scripts and "alert(1)</script>" not in text
    assert {row["label"] for row in parsed.rows} == {cell.label for cell in sweep.plan.cells}
    for name in ODD[:3]:
        assert any(name in said for said in parsed.texts), name
    # plotly.js interprets some HTML in names.
    names = {trace.get("name", "") for figure in parsed.figures for trace in figure["data"]}
    assert not any("<" in name for name in names) and any("&lt;/script&gt;" in name for name in names)


def test_the_ends_of_long_names_can_be_read_on_phones_and_on_paper(tmp_path):
    sweep = DrawnSweep(tmp_path, ["some-organisation/a-model-with-a-name-of-70B-parameters-Instruct"])
    (tmp_path / "report.html").write_text(page(sweep.evidence()))
    with opened(tmp_path / "report.html") as shown:
        assert shown.overflow(390) == 0
        cells = "[...document.querySelectorAll('#rows td:first-child')]"
        assert shown.page.evaluate(f"{cells}.filter((it) => it.scrollWidth > it.clientWidth).length") == 0
        shown.page.emulate_media(media="print")
        shown.overflow(700)
        right = "(it) => document.querySelector(it).getBoundingClientRect().right"
        assert shown.page.evaluate(right, "#rows") <= shown.page.evaluate(right, "#rows-section")


def test_long_names_in_notes_do_not_widen_the_page(tmp_path):
    """Names with underscores have no place where a line may end."""
    sweep = DrawnSweep(tmp_path, ["A_model_with_a_name_of_70B_parameters_fine_tuned_on_Instructions_v2"])
    rows = [dict(row, measured_as=row["label"]) for row in sweep.evidence().rows]
    rows[-1] |= {"status": "missing", "cause": "evaluate has not run yet"}
    running = made(1, BEGIN, None, state="open")
    evidence = collect(tmp_path, sweep.plan, rows, lambda _: [running], BEGIN + 1)
    (tmp_path / "report.html").write_text(page(evidence))
    with opened(tmp_path / "report.html") as shown:
        assert shown.overflow(390) == 0


def test_shares_that_are_all_alike_are_on_an_axis_of_possible_shares(tmp_path, monkeypatch):
    monkeypatch.undo()  # the library is needed
    (tmp_path / "report.html").write_text(page(DrawnSweep(tmp_path, methods=(), ratios=()).evidence()))
    with opened(tmp_path / "report.html") as shown:
        shown.drawn()
        ranges = "[...document.querySelectorAll('#distance .plot')].map((it) => it.layout.yaxis.range)"
        assert [-0.05, 1.05] in shown.page.evaluate(ranges)


def test_rows_that_were_measured_in_another_way_are_named_above_the_charts(tmp_path):
    sweep = DrawnSweep(tmp_path)
    rows = [dict(row, measured_as="a") for row in sweep.evidence().rows]
    rows[-1]["measured_as"] = "b"
    told = f"measured in another way: {rows[-1]['label']}."
    assert told in page(collect(tmp_path, sweep.plan, rows, lambda _: (), math.pi))
    rows[-1]["measured_as"] = "a"
    assert "another way" not in page(collect(tmp_path, sweep.plan, rows, lambda _: (), math.pi))


def test_a_missing_row_says_why(tmp_path):
    sweep = DrawnSweep(tmp_path, missing={"m 0.5 other"})
    parsed = Parsed(page(sweep.evidence()))
    assert "missing" in parsed.ids and "evaluate has not run yet" in parsed.texts
    assert [row["label"] for row in parsed.rows if row["status"] == "missing"] == ["m 0.5 other"]


def test_a_sweep_that_has_nothing_yet_is_a_page_too(tmp_path):
    planned = DrawnSweep(tmp_path / "drawn")
    for plan, dense in ((Plan({}, ()), {}), (planned.plan, planned.dense)):
        sweep = DrawnSweep(tmp_path / "none", ())
        sweep.plan, sweep.dense = plan, dense
        parsed = Parsed(page(sweep.evidence()))
        assert set(CHARTS) <= set(parsed.ids) and parsed.figures == []
        assert "No stage has begun yet." in parsed.texts and "No artifact yet." in parsed.texts
        assert len(parsed.rows) == len(plan.cells)


def test_a_page_of_a_thousand_rows_stays_small(tmp_path):
    methods, ratios = [f"method-{number}" for number in range(6)], [0.1, 0.2, 0.3, 0.4, 0.5]
    evidence = DrawnSweep(tmp_path, ["m"], methods, ratios, tasks=[f"task {number}" for number in range(10)]).evidence()
    text = page(evidence)
    library = 4_900_000
    assert library + len(text) * 1000 / len(evidence.rows) < 10_000_000


def test_it_asks_the_network_for_nothing(tmp_path):
    text = page(DrawnSweep(tmp_path).evidence())
    assert "default-src 'none'" in text
    assert all(address.startswith(("#", "data:", "store/")) for address in Parsed(text).addresses)


def test_links_lead_to_checkpoints_and_logs_wherever_the_folder_lies(tmp_path):
    sweep = DrawnSweep(tmp_path / "a b")
    log = sweep.out / "logs" / "prune 1.log"
    attempts = {stage_id: [made(1, BEGIN, BEGIN + 1, logs=(log,))] for stage_id in sweep.plan.stages}
    addresses = Parsed(page(sweep.evidence(attempts))).addresses
    assert "logs/prune%201.log" in addresses
    checkpoints = {cell.producers[-1] for cell in sweep.plan.cells if cell.producers}
    assert {f"store/{stage_id}" for stage_id in checkpoints} <= set(addresses)


def test_numbers_that_are_none_are_none(tmp_path):
    """What wasn't finite is null in a manifest, and JSON for a browser must not contain NaN."""
    sweep = DrawnSweep(tmp_path)
    rows = [dict(row, kl=None, perplexity=None) for row in sweep.evidence().rows]
    parsed = Parsed(page(collect(tmp_path, sweep.plan, rows, lambda _: (), math.pi)))
    assert {row["kl"] for row in parsed.rows} == {""}


@pytest.mark.parametrize("name", ["wall_time_s", "finished"])
@pytest.mark.parametrize("known", [True, False])
def test_times_that_a_manifest_does_not_tell_are_left_out(tmp_path, name, known):
    sweep = DrawnSweep(tmp_path)
    for file in sorted((tmp_path / "store").glob("*/*/manifest.json"))[known:]:
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: None}))
    text = page(sweep.evidence())
    if name == "wall_time_s":
        assert "made, in 0.0 hours" in text
    else:
        assert ("<td>finished</td>" in text) == known

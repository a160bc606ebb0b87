"""The page as text: what it contains, whatever things are called and whatever is missing."""

import csv
import json
import math
import random
import re
from html import unescape
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from made_stages import begun, being_made, stage_of
from rows import efficiency

from hfprune_dist.planning.plan import Cell, Plan, label_of
from hfprune_dist.report import charts, page
from hfprune_dist.results.metrics import headline
from hfprune_dist.results.rows import DenseModel, Row, collect_rows
from hfprune_dist.results.table import write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import End, local_log
from hfprune_dist.store.stage import Input, Stage

ODD = ["<script>alert(1)</script>", "a\"b'c&amp;<b>", "%{x} ${y} </script><!--", "--method=x y"]
RATIOS = (0.2, 0.5)
LAYERS, WIDTH, STEPS = 4, 48, 12
BEGIN = 1_800_000_000.0


class DrawnSweep:
    """Models x methods x ratios, with and without recovery, and dense ones; rows ``missing`` have no evaluation."""

    def __init__(
        self, out: Path, models=("m",), methods=("hfprune", "other"), *, tasks=("piqa",), timed=False, missing=()
    ):
        self.out, self.methods, self.tasks, self.timed, self.missing = out, methods, tasks, timed, missing
        self._random = random.Random(0)
        self._stages: dict[str, Stage] = {}
        self._cells: list[Cell] = []
        self._now = BEGIN
        out.mkdir(parents=True, exist_ok=True)
        for model in models:
            self._add_model(model, Input(f"digest of {model}", f"/{model}"))
        self.plan = Plan(self._stages, tuple(self._cells))
        self.dense = {model: DenseModel(1000, {"intermediate_size": WIDTH}) for model in models}

    def rows(self) -> list[Row]:
        return collect_rows(self.plan, Store(self.out / "store"), self.dense)

    def page(self, rows=None) -> str:
        return page.page(self.out, self.plan, rows or self.rows(), self._now)

    def fail(self, message: str) -> None:
        """Record a failed attempt at each stage, with its log."""
        (self.out / "logs").mkdir()
        for stage in self._stages.values():
            attempt = begun(Store(self.out / "store"), stage)
            attempt.close(End("input", message, BEGIN + 9))
            local_log(self.out / "logs", attempt.intent).touch()

    def _add_model(self, model, dense):
        scored = self._stage("importance", model, {"model": dense})
        self._add_cells(model, dense, None, None, (), dense)
        for method in self.methods:
            for ratio in RATIOS:
                inputs = {"model": dense, "importance": scored.as_input()}
                label = label_of(model, ratio, method, "none")
                sizes = {"intermediate_size": round((1 - ratio) * WIDTH), "parameters": round((1 - ratio) * 1000)}
                pruned = self._stage("prune", label, inputs, ratio_reached=ratio + 0.001, **sizes)
                self._write(pruned, "kept.json", json.dumps(self._kept(sizes["intermediate_size"])))
                self._add_cells(model, dense, ratio, method, (scored.id, pruned.id), pruned.as_input())

    def _add_cells(self, model, dense, ratio, method, producers, checkpoint):
        label = label_of(model, ratio, method, "none")
        efficiency = {"model": checkpoint, "dense": dense}
        timed = self._stage("efficiency", label, efficiency, **self._efficiency(ratio)).id if self.timed else None
        recovered = self._stage("recover", label_of(model, ratio, method, "lora"), {"model": checkpoint})
        losses = [{"step": step, "loss": 3 / step} for step in range(1, STEPS)]
        self._write(recovered, "loss.jsonl", "".join(json.dumps(line) + "\n" for line in losses))
        for recovery, made, model_input in (
            ("none", producers, checkpoint),
            ("lora", (*producers, recovered.id), recovered.as_input()),
        ):
            label = label_of(model, ratio, method, recovery)
            scores = {"fidelity": self._fidelity(), "other_texts": {"papers": self._fidelity()}, "tasks": self._tasks()}
            inputs = {"model": model_input, "dense": dense}
            evaluated = self._stage("evaluate", label, inputs, made=label not in self.missing, **scores)
            self._cells.append(Cell(label, model, ratio, method, "entropy", recovery, made, evaluated.id, timed))

    def _stage(self, kind, label, inputs, made=True, **metrics):
        stage = stage_of(kind, label, {"number": len(self._stages)}, inputs)
        self._stages[stage.id] = stage
        if made:
            times = {"started": self._now, "finished": self._now + 60, "wall_time_s": 60.0, "world_size": 1}
            origin = {"provenance": {"git_commit": "c0ffee", "packages": {"torch": "2"}}, "config": {"seed": 0}}
            self._write(stage, "manifest.json", json.dumps({"files": {}, "metrics": metrics, **times, **origin}))
        self._now += 60
        return stage

    def _write(self, stage, name, text):
        file = self.out / "store" / stage.id / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def _fidelity(self):
        return {"perplexity": 10 + self._random.random(), "kl": self._random.random(), "top1_agreement": 0.5}

    def _efficiency(self, ratio):
        factor = 1 / (1 - (ratio or 0.0))
        return efficiency(factor, tokens_per_s=100 * factor, seconds=0.5 / factor)

    def _tasks(self):
        return {task: {"acc": self._random.random(), "acc_stderr": 0.01} for task in self.tasks}

    def _kept(self, width):
        neurons = [sorted(self._random.sample(range(WIDTH), width)) for _ in range(LAYERS)]
        return {"layers": list(range(LAYERS)), "neurons": neurons}


def rows_of(text):
    """Rows of the page's table: column of results.csv -> value."""
    columns = [unescape(column) for column in re.findall('<button type=button title="(.*?)"', text)]
    lines = [re.findall('<td(?: data-v="(.*?)")?>(.*?)</td>', line) for line in re.findall("<tr class=.*", text)]
    return [
        dict(
            zip(
                columns,
                (unescape(value or ("" if "<" in said or said == "-" else said)) for value, said in line),
                strict=True,
            )
        )
        for line in lines
    ]


def tooltips(text):
    return [unescape(told) for told in re.findall("<title>(.*?)</title>", text)]


def test_the_table_has_every_number_of_results_csv(tmp_path):
    missing, tasks = {"n 0.5 other + lora"}, ("piqa", "arc")
    sweep = DrawnSweep(tmp_path, ["m", "n"], missing=missing, tasks=tasks, timed=True)
    write_reports(sweep.rows(), tmp_path)
    with (tmp_path / "results.csv").open(newline="") as stream:
        expected = list(csv.DictReader(stream))
    shown = rows_of(sweep.page())
    assert len(shown) == len(expected) == 20
    assert [{column: row[column] for column in expected[0]} for row in shown] == expected


def test_charts_have_the_numbers_of_rows(tmp_path):
    sweep = DrawnSweep(tmp_path, tasks=("piqa", "arc"))
    text, pruned = sweep.page(), [row for row in sweep.rows() if row["ratio"]]
    told = tooltips(text)
    for row in pruned:
        name, size = row["method"] + (" + lora" if row["recovery"] == "lora" else ""), row["parameters"]
        assert f"{name}: {size}, {row['kl']:.3g}" in told
        for value, error in ((row["average"], row["average_stderr"]), *map(headline, row["tasks"].values())):
            assert f"{name}: {size}, {100 * value:.3g}%±{100 * error:.3g}%" in told
    assert sum(": " in point for point in told[1:]) == len(pruned) * 6, "KL on two texts, agreement, avg, two tasks"
    places = [text.index(f'id="{section}') for section in ("quality", "rows", "tasks", "layers", "losses", "failures")]
    assert places == sorted(places)


def test_no_chart_is_without_points_and_no_name_in_a_legend_without_a_line(tmp_path):
    plan = DrawnSweep(tmp_path).plan
    missing = {cell.label for cell in plan.cells if cell.ratio or cell.recovery == "lora"}
    text = DrawnSweep(tmp_path / "dense", missing=missing).page()
    assert 'id="quality"' not in text and 'id="tasks"' not in text
    figures = DrawnSweep(tmp_path / "one", missing=missing - {"m 0.2 other + lora"}).page().split("<figure>")
    assert all(figure.count("<polyline") == figure.count("<svg class=key") > 0 for figure in figures[1:])
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
    assert text.count("<script") == text.count("</script") == 1 and "&amp;<b>" not in text and "<!--" not in text
    assert {row["label"] for row in rows_of(text)} == {cell.label for cell in sweep.plan.cells}


def test_the_finding_comes_first_then_what_failed_or_is_missing(tmp_path):
    sweep = DrawnSweep(tmp_path, missing={"m 0.5 other", "m 0.5 hfprune"})
    by_label = {cell.label: cell for cell in sweep.plan.cells}
    cell, waits = (by_label[name] for name in ("m 0.5 hfprune", "m 0.5 other"))
    for cause, message in (("interrupted", "the launcher was"), ("input", "no such task")):
        attempt = begun(Store(tmp_path / "store"), sweep.plan.stages[cell.evaluate])
        attempt.close(End(cause, message, 1.0))
    begun(Store(tmp_path / "store"), sweep.plan.stages[waits.evaluate], time_minutes=1)  # a job that waits
    rows = [dict(row, measured_as="a") for row in sweep.rows()]
    rows[-1]["measured_as"] = "b"
    text = sweep.page(rows=rows)
    assert "interrupted" not in text, "which is no failure"
    said = re.findall("<p class='?(finding|note .*?)'?>(.*?)</p>", text[: text.index("<figure")])
    (_, finding), failures, (kind, lacking) = said
    assert finding.startswith("m: with 20 % removed, ")
    assert failures == ("note failed", "m 0.5 hfprune: evaluate failed (input): no such task")
    assert kind == "note missing" and lacking.startswith("m 0.5 other: evaluate has not run yet<br>")
    assert lacking.endswith(f"with other libraries: {rows[-1]['label']}")
    assert [row["label"] for row in rows_of(text) if row["status"] == "missing"] == ["m 0.5 other"]


def test_links_are_relative_and_nothing_else_is_asked_for(tmp_path):
    sweep = DrawnSweep(tmp_path / "a b")
    sweep.fail("no such text")
    text = sweep.page()
    addresses = re.findall('(?:src|href)="(.*?)"', text)
    logs = {f"logs/{stage_id.replace('/', '-')}.1.log" for stage_id in sweep.plan.stages}
    assert logs <= set(addresses) and "default-src 'none'" in text
    assert {f"store/{cell.producers[-1]}" for cell in sweep.plan.cells if cell.producers} <= set(addresses)
    assert all(address.startswith(("#", "data:", "store/", "logs/")) for address in addresses)


# The data that charts are drawn from.


@given(st.lists(st.sampled_from([0.5, math.nan, math.inf, None]), max_size=1000))
def test_losses_are_thinned_to_their_end_and_those_that_are_not_finite_left_out(tmp_path_factory, losses):
    file = tmp_path_factory.mktemp("loss") / "loss.jsonl"
    assert charts.training_losses(file) == {}, "removed to make room"
    file.write_text("".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in enumerate(losses, 1)))
    found, finite = charts.training_losses(file), [step for step, loss in enumerate(losses, 1) if loss == 0.5]
    assert len(found) <= charts.MOST_POINTS + 1 and set(found.values()) <= {0.5}
    assert [*found][:1] == finite[:1] and [*found][-1:] == finite[-1:]


def test_rounds_are_drawn_at_their_own_ratios(tmp_path):
    """What a round has left and learnt is that of no other row here."""
    store, made, stages = Store(tmp_path / "store"), Input("digest", "/model"), []
    for ratio in (0.3, 0.5):
        stages.append(stage_of("prune", "", {"ratio": ratio}, {"model": made}))
        stages.append(stage_of("recover", "", {}, {"model": stages[-1].as_input()}))
        made = stages[-1].as_input()
    left = {stages[0].id: [0, 2, 3], stages[2].id: [0, 2]}  # the second as the first numbers them
    for stage in stages:
        with being_made(store, stage, world_size=1, wall_time_s=1.0) as draft:
            layers = left.get(stage.id, [])
            (draft / "kept.json").write_text(json.dumps({"layers": layers, "neurons": [[1, 2] for _ in layers]}))
            (draft / "loss.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    evaluate, producers = stage_of("evaluate", "", {}, {"model": made}), tuple(stage.id for stage in stages)
    cell = Cell("row", "m", 0.5, "hfprune", "entropy", "lora via 0.3", producers, evaluate.id, rounds=(0.3,))
    plan = Plan({stage.id: stage for stage in (*stages, evaluate)}, (cell,))
    rows = collect_rows(plan, store, {"m": DenseModel(100, {})})
    drawn = {
        chart.id: {line.name: line.points for panel in chart.panels for line in panel.lines}
        for chart in charts.charts(rows, plan, store)
    }
    bars = {
        name: {place for place, (_, height, _) in enumerate(points[::2]) if height}
        for name, points in drawn["layers"].items()
    }
    assert bars == {"hfprune 0.3": {0, 2, 3}, "hfprune 0.5": {0, 3}}, "layers of the dense model"
    assert [*drawn["losses"]] == ["hfprune 0.3 + lora", "hfprune 0.5 + lora via 0.3"]

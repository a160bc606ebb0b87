"""The data that charts are drawn from: overlaps of sets, idle times, curves."""

import json
import math

import pytest
from drawn_sweep import BEGIN, DrawnSweep, made
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.planning.plan import Plan
from hfprune_dist.report import charts
from hfprune_dist.report.chart import DASHES, GREY, PALETTE, SYMBOLS, Key, dashes_told, line, method_key
from hfprune_dist.report.charts import LONG_IDLE_S, LONG_IDLE_SHARE, Period, common_share, long_idle_times, timeline

KEPT = st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 70), min_size=1), min_size=1)


def chart(evidence, name):
    (found,) = [it for it in charts.charts(evidence) if it.id == name]
    return found


@given(KEPT, KEPT)
def test_overlap_is_what_sets_have_in_common(ours, theirs):
    first, second = ({layer: sum(1 << unit for unit in units) for layer, units in it.items()} for it in (ours, theirs))
    pairs = [{(layer, unit) for layer, units in kept.items() for unit in units} for kept in (ours, theirs)]
    assert common_share(first, second) == len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])


def test_checkpoints_of_one_method_are_told_apart_where_their_overlap_is_drawn(tmp_path):
    """As when rows without recovery are of an earlier run with other calibration text."""
    sweep = DrawnSweep(tmp_path, methods=("hfprune", "hfprune", "other"), ratios=(0.2,))
    dense, again, other = sweep.plan.cells[:2], sweep.plan.cells[2:6], sweep.plan.cells[6:]
    cells = (*dense, again[0], again[3], *other)
    assert [it.recovery for it in cells] == ["none", "lora"] * 3 and again[0].producers[1] != again[3].producers[1]
    sweep.plan = Plan(sweep.plan.stages, cells)
    (shares,) = [trace for figure in chart(sweep.evidence(), "overlap").figures for trace in figure.data]
    assert shares["x"] == shares["y"] == ["hfprune", "hfprune + lora", "other"]
    assert shares["z"][0][1] == shares["z"][1][0] < 1


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e4)), min_size=1, max_size=8))
def test_only_long_idle_times_are_left_out(times):
    periods = [Period(None, None, start, start + seconds) for start, seconds in sorted(times)]
    for begin, end in long_idle_times(periods):
        assert end - begin > max(LONG_IDLE_S, LONG_IDLE_SHARE * max(it.end - it.start for it in periods))
        assert all(it.end <= begin or it.start >= end for it in periods)


def test_every_attempt_is_a_bar_where_it_ran(tmp_path):
    sweep = DrawnSweep(tmp_path, methods=(), ratios=())
    first, second, *_ = sweep.plan.stages
    failed = made(1, BEGIN, BEGIN + 10, state="failed", cause="killed", where="job 7 on n1")
    attempts = {first: [failed, made(2, BEGIN + 20, BEGIN + 50)], second: [made(1, BEGIN + 1e6, None, state="open")]}
    (figure,) = timeline(sweep.evidence(attempts)).figures
    bars = [
        (base, width, pattern, hover)
        for trace in figure.data
        for base, width, pattern, hover in zip(
            trace["base"], trace["x"], trace["marker"]["pattern"]["shape"], trace["hovertext"], strict=True
        )
    ]
    assert [bar[:3] for bar in bars[:2]] == [
        ("2027-01-15 08:00:00.000000", 10_000.0, "x"),
        ("2027-01-15 08:00:20.000000", 30_000.0, ""),
    ]
    assert "killed, job 7 on n1" in bars[0][3] and bars[2][2] == "."
    (gap,) = figure.layout["xaxis"]["rangebreaks"]
    assert gap["bounds"] == ["2027-01-15 08:00:50.000000", "2027-01-26 21:46:40.000000"]


def test_a_kind_of_stage_more_than_there_are_colours_is_drawn_too(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "STAGE_VERSIONS", {f"kind {number}": 1 for number in range(9)} | charts.STAGE_VERSIONS)
    sweep = DrawnSweep(tmp_path, timed=True)
    drawn = timeline(sweep.evidence({stage_id: [made(1, BEGIN, BEGIN + 1)] for stage_id in sweep.plan.stages}))
    assert len({key.color for key in drawn.keys}) == len(drawn.keys) == 5


def test_many_methods_can_be_told_apart_by_colour_and_mark():
    methods = [f"method {number}" for number in range(20)]
    keys = [method_key(method, methods) for method in methods]
    assert len({(key.color, key.symbol) for key in keys}) == len(keys)
    traces = [line(key, [0, 1], [2, 3]) for key in keys]
    assert [trace["mode"] for trace in traces[len(PALETTE) - 1 : len(PALETTE) + 1]] == ["lines", "lines+markers"]
    assert all(Key("m", GREY, symbol=symbol).entry().count("<path") == 2 for symbol in SYMBOLS)


def test_ratios_of_a_method_differ_in_their_dashes(tmp_path):
    ratios = tuple(it / 20 for it in range(1, len(DASHES) + 1))
    evidence = DrawnSweep(tmp_path, methods=("hfprune",), ratios=ratios).evidence()
    for name in ("losses", "layers"):
        drawn = chart(evidence, name)
        (figure,) = drawn.figures
        pruned = [it for it in figure.data if it["legendgroup"] == "hfprune"]
        assert len({it["line"]["dash"] for it in pruned}) == len(pruned) == len(ratios)
        assert "Lines by ratio" in drawn.about
    assert dashes_told([0.125, 0.3]) == " Lines by ratio: solid 12.5%, dashed 30%."
    assert dashes_told([0.125]) == ""


def test_losses_are_thinned_to_their_end_and_those_that_are_not_finite_left_out(tmp_path):
    file = tmp_path / "loss.jsonl"
    assert charts.training_losses(file) == {}, "removed to make room"
    losses = [1 / step for step in range(1, 1001)]
    losses[1:4] = [math.nan, math.inf, None]
    file.write_text("".join(json.dumps({"step": step, "loss": it}) + "\n" for step, it in enumerate(losses, 1)))
    found = charts.training_losses(file)
    assert len(found) <= charts.MOST_POINTS + 1 and found[1000] == 1 / 1000 and found[1] == 1.0
    assert all(map(math.isfinite, found.values()))


def test_faults_of_ours_are_not_taken_for_missing_files(tmp_path):
    """Only a file that was removed is left out without a word."""
    sweep = DrawnSweep(tmp_path, methods=("hfprune",), ratios=(0.2,))
    pruned = next((tmp_path / "store" / "prune").iterdir())
    (pruned / "kept.json").unlink()
    assert chart(sweep.evidence(), "layers").figures == []
    (pruned / "kept.json").write_text("{}")
    with pytest.raises(KeyError, match="layers"):
        charts.charts(sweep.evidence())

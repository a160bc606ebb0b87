"""The data that charts are drawn from: overlaps of sets, sessions of work, curves."""

import json
import math
from itertools import pairwise

import pytest
from drawn_sweep import BEGIN, DrawnSweep, made
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.planning.plan import Plan
from hfprune_dist.report import curves, layers
from hfprune_dist.report.chart import DASHES, GREY, SYMBOLS, Key, dashes_told, line, method_key
from hfprune_dist.report.layers import KeptUnits, _bits
from hfprune_dist.report.legend import legend_entry
from hfprune_dist.report.timeline import (
    COLORS,
    LONG_IDLE_S,
    LONG_IDLE_SHARE,
    Period,
    _offsets,
    _sessions,
    timeline_chart,
)
from hfprune_dist.store.stage import STAGE_VERSIONS

ODD_ROWS = '{"format": 2, "layers": [0, 1], "neurons": [[0]]}'
KEPT = st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 70), min_size=1), min_size=1)


@given(KEPT, KEPT)
def test_overlap_is_what_sets_have_in_common(ours, theirs):
    first, second = (
        KeptUnits({layer: _bits(sorted(units)) for layer, units in kept.items()}) for kept in (ours, theirs)
    )
    pairs = [{(layer, unit) for layer, units in kept.items() for unit in units} for kept in (ours, theirs)]
    assert first.common_share(second) == len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])
    assert first.counts(6) == [len(ours.get(layer, ())) for layer in range(6)]


def test_checkpoints_of_one_method_are_told_apart_where_their_overlap_is_drawn(tmp_path):
    """As when rows without recovery are of an earlier run with other calibration text."""
    sweep = DrawnSweep(tmp_path, methods=("hfprune", "hfprune", "other"), ratios=(0.2,))
    dense, again, other = sweep.plan.cells[:2], sweep.plan.cells[2:6], sweep.plan.cells[6:]
    cells = (*dense, again[0], again[3], *other)
    assert [it.recovery for it in cells] == ["none", "lora"] * 3 and again[0].producers[1] != again[3].producers[1]
    sweep.plan = Plan(sweep.plan.stages, cells)
    (overlap,) = [it for it in layers.layer_charts(sweep.evidence()) if it.id == "overlap"]
    (shares,) = [trace for figure in overlap.figures for trace in figure.data]
    assert shares["x"] == shares["y"] == ["hfprune", "hfprune + lora", "other"]
    assert shares["z"][0][1] == shares["z"][1][0] < 1


@given(st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e4)), min_size=1, max_size=8))
def test_only_long_idle_times_are_left_out(times):
    periods = [Period(None, None, start, start + seconds) for start, seconds in sorted(times)]
    sessions = [*_sessions(periods)]
    assert all(any(begin <= it.start and it.end <= end for begin, end in sessions) for it in periods)
    for (_, end), (begin, _) in pairwise(sessions):
        assert begin - end > max(LONG_IDLE_S, LONG_IDLE_SHARE * max(it.end - it.start for it in periods))
        assert not any(it.start < begin and it.end > end for it in periods)
    assert [place for _, place in _offsets(sessions)] == sorted(place for _, place in _offsets(sessions))


def test_every_attempt_is_a_bar_where_it_ran(tmp_path):
    sweep = DrawnSweep(tmp_path, methods=(), ratios=())
    first, second, *_ = sweep.plan.stages
    failed = made(1, BEGIN, BEGIN + 10, state="failed", cause="killed", where="job 7 on n1")
    attempts = {first: [failed, made(2, BEGIN + 20, BEGIN + 50)], second: [made(1, BEGIN + 1e6, None, state="open")]}
    (figure,) = timeline_chart(sweep.evidence(attempts)).figures
    bars = [
        (base, width, pattern, hover)
        for trace in figure.data
        for base, width, pattern, hover in zip(
            trace["base"], trace["x"], trace["marker"]["pattern"]["shape"], trace["hovertext"], strict=True
        )
    ]
    assert [bar[:3] for bar in bars[:2]] == [(0.0, 10.0, "x"), (20.0, 30.0, "")]
    assert "killed, job 7 on n1" in bars[0][3]
    assert bars[2][0] == 50.0 and bars[2][2] == ".", "the idle time before it is left out"


def test_kinds_of_stages_differ_in_colour():
    assert len({*COLORS.values()}) == len(COLORS) == len(STAGE_VERSIONS)


def test_many_methods_can_be_told_apart_by_colour_and_mark():
    methods = [f"method {number}" for number in range(20)]
    keys = [method_key(method, methods) for method in methods]
    assert len({(key.color, key.symbol) for key in keys}) == len(keys)
    traces = [line(key, [0, 1], [2, 3]) for key in keys]
    assert [trace["mode"] for trace in traces[5:7]] == ["lines", "lines+markers"]
    assert all(legend_entry(Key("m", GREY, symbol=symbol)).count("<path") == 2 for symbol in SYMBOLS)


@pytest.mark.parametrize("number", range(1, 12))
def test_no_two_ratios_of_a_method_look_alike(tmp_path, number):
    """With too many of them for lines of their own, those of a method are one, within its range."""
    sweep = DrawnSweep(tmp_path, methods=("hfprune",), ratios=tuple(it / 20 for it in range(1, number + 1)))
    evidence = sweep.evidence()
    charts = {it.id: it for it in (*curves.curve_charts(evidence), *layers.layer_charts(evidence))}
    for chart in (charts["losses"], charts["layers"]):
        (figure,) = chart.figures
        pruned = [it for it in figure.data if it["legendgroup"] == "hfprune" and "fill" not in it]
        assert len(pruned) == (number if number <= len(DASHES) else 1)
        assert len({it["line"]["dash"] for it in pruned}) == len(pruned)
        assert ("Lines by ratio" in chart.about) == (1 < number <= len(DASHES))


def test_ratios_are_told_as_they_were_asked_for():
    assert dashes_told([0.125, 0.3], "ratio") == " Lines by ratio: solid 12.5%, dashed 30%."


def test_long_curves_are_thinned_to_their_end(tmp_path):
    file = tmp_path / "loss.jsonl"
    file.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 1001)))
    losses = curves._training_losses(file)
    assert len(losses) <= curves.MOST_POINTS + 1 and losses[1000] == 1 / 1000 and losses[1] == 1.0


NO_STEPS = ['{"step": [], "loss": 1}', '{"loss": 1.0}', '{"step": Infinity, "loss": 1}']


@pytest.mark.parametrize("damaged", ['{"step": 1, "lo', "[]", "3", *NO_STEPS])
def test_losses_that_cannot_be_read_are_left_out_until_they_can(tmp_path, damaged):
    file = tmp_path / "loss.jsonl"
    assert curves._training_losses(file) == {}
    file.write_text(damaged)
    assert curves._training_losses(file) == {}
    file.write_text('{"step": 1, "loss": 0.5}')
    assert curves._training_losses(file) == {1: 0.5}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, None])
def test_steps_without_a_finite_loss_are_left_out(tmp_path, loss):
    lines = [json.dumps({"step": step, "loss": it}) for step, it in enumerate((loss, 0.5, loss))]
    (tmp_path / "loss.jsonl").write_text("\n".join(lines))
    assert curves._training_losses(tmp_path / "loss.jsonl") == {1: 0.5}


@pytest.mark.parametrize(
    "damaged", ['{"layers": [', "[]", "3", '{"format": 2}', '{"format": 3, "layers": [0]}', ODD_ROWS, '{"layers": 3}']
)
def test_units_that_cannot_be_read_are_left_out_until_they_can(tmp_path, damaged):
    assert layers._kept(tmp_path) == {}
    (tmp_path / "kept.json").write_text(damaged)
    assert layers._kept(tmp_path) == {}
    (tmp_path / "kept.json").write_text('{"format": 2, "layers": [1], "neurons": [[0, 2]]}')
    assert layers._kept(tmp_path) == {"neurons": KeptUnits({1: 0b101})}

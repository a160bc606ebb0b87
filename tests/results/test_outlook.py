"""What more training would give, from curves of a known law, and where that is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_stages import being_made, stage_of

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.report.page import page
from hfprune_dist.results.outlook import LEAST_POINTS, Law, Run, outlook_of_planned
from hfprune_dist.results.rows import DenseModel, collect_rows
from hfprune_dist.results.table import report
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input

LAWS = [(0.3, 2.0, 0.5), (0.0, 1.5, 0.2), (0.5, 3.0, 1.0), (0.1, 1.0, 0.08)]


def curve(law, noise=0.0, points=10, seed=0):
    """Tokens, every 30k -> KL, with relative noise."""
    (floor, factor, exponent), tokens = law, 30_000 * np.arange(1, points + 1)
    kls = (floor + factor * (tokens / 30_000) ** -exponent) * np.exp(
        noise * np.random.default_rng(seed).standard_normal(points)
    )
    return dict(zip(tokens.tolist(), kls.tolist(), strict=True))


@pytest.mark.parametrize("known", LAWS)
def test_a_known_law_is_found_and_predicts_ten_times_as_far(known):
    floor, factor, exponent = known
    law, true = Law.fitted(curve(known)), floor + factor * 100.0**-exponent
    assert law.at(3_000_000)[0] == pytest.approx(true, rel=0.001)
    assert law.tokens_to(floor + factor / 2) == pytest.approx(30_000 * 2 ** (1 / exponent), rel=0.01)
    assert law.tokens_to(0.9 * floor) == float("inf")


@pytest.mark.parametrize(("points", "of_each_law"), [(LEAST_POINTS, 0.7), (10, 0.85)])
@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_errors_are_as_large_as_they_are_said_to_be(noise, points, of_each_law):
    """Two of them hold about nine predictions in ten, of a law at least seven, and are smaller with less noise."""
    within, ahead = [], 300_000 * points
    for floor, factor, exponent in LAWS:
        known, true = (floor, factor, exponent), floor + factor * (10.0 * points) ** -exponent
        told = [Law.fitted(curve(known, noise, points, seed)).at(ahead) for seed in range(40)]
        within.append(np.mean([abs(kl - true) < 2 * error for kl, error in told]))
        assert np.median([error for _, error in told]) > 3 * Law.fitted(curve(known, points=points)).at(ahead)[1]
    assert np.mean(within) > 0.85 and min(within) > of_each_law


def test_a_law_that_does_not_hold_has_a_large_error():
    """It falls by a law, and then not any more."""
    points = curve(LAWS[0])
    broken = {tokens: max(kl, 1.3) for tokens, kl in points.items()}
    (_, held), (_, failed) = (Law.fitted(each).at(3_000_000) for each in (points, broken))
    assert failed > 10 * held


def test_what_is_told_of_few_points_and_of_far_away():
    run = Run(curve(LAWS[0]), tokens=300_000, untrained=5.0, hours=1e-6)
    assert run.outlook() == (
        "KL 0.500±0.000 after 3M tokens (3 device-hours); of what pruning lost, regained: half by 30k tokens (0.03 "
        "device-hours), 90 % after 3M tokens (3 device-hours) (by 10 points up to 300k tokens)"
    )
    assert "90 % not within 30M tokens (30 device-hours)" in replace(run, untrained=2.5).outlook()
    assert "device-hours" not in replace(run, hours=None).outlook()
    assert run.outlook(600_000).startswith("KL 0.74") and "regained" not in run.outlook(600_000)
    assert run.outlook(1e9) == "too far ahead: by 10 points up to 300k tokens, of 1B"
    few = Run(curve(LAWS[0], points=3), tokens=90_000, untrained=5.0, hours=None)
    assert few.outlook() == "too few points: by 3 points up to 90k tokens; 6 give an outlook"


def test_what_was_measured_goes_before_what_the_law_says():
    kls = [1.0, 0.9, 0.85, 0.82, 0.8, 0.805]
    run = Run({1000.0 * step: kl for step, kl in enumerate(kls, 1)}, tokens=6000, untrained=5.0, hours=None)
    assert "regained: half by 1k tokens, 90 % not within" in run.outlook()
    assert "half by 5k tokens" in replace(run, untrained=1.6).outlook()
    assert Law.fitted(run.points).tokens_to(1.595 / 2) < 6000  # by when it wasn't that low
    assert "half after 6k tokens" in replace(run, untrained=1.595).outlook()


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({}, 10),
        ({0: {"learning_rate": 0.0}}, 9),  # of the warm-up
        ({4: {"held_out_kl": 0.0}, 9: {"held_out_kl": -1e-9}}, 8),
        ({step: {"learning_rate": 0.0} for step in range(10)}, None),
        ({0: {"untrained_kl": None}}, None),
    ],
)
def test_points_that_no_law_passes_through_are_left_out(tmp_path, changed, left):
    lines = [
        {"learning_rate": 1e-4, "tokens": tokens, "held_out_kl": kl, "untrained_kl": 5.0}
        for tokens, kl in curve(LAWS[0]).items()
    ]
    for step, values in changed.items():
        lines[step] = {name: value for name, value in (lines[step] | values).items() if value is not None}
    handle = Store(tmp_path).handle(stage_of("recover", "m").id)
    handle.work.mkdir(parents=True)
    (handle.work / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run.read(handle)
    assert (run and len(run.points)) == left
    assert run is None or run.outlook().startswith("KL 0.")


def lines_of(points):
    """Lines of a training whose rate is half of its peak on average, up to each point."""
    lines = [{"learning_rate": 1e-4, "untrained_kl": 5.0}]
    for tokens, kl in points.items():
        lines += [{"learning_rate": 0.0, "tokens": tokens, "held_out_kl": kl}, {"learning_rate": 1e-4}]
    return "".join(json.dumps({"step": step, "loss": 1.0, **line}) + "\n" for step, line in enumerate(lines, 1))


def test_the_decay_of_the_rate_is_no_floor(tmp_path):
    """KL falls by what was learnt, which is less and less of each token; a whole run has learnt half of its tokens."""
    lines, learnt, steps = [], 0.0, 100
    for step in range(steps):
        rate = 0.5 * (1 + np.cos(np.pi * step / steps))
        learnt += 1000 * rate
        kl = 3.0 * (learnt / 1000) ** -0.2
        lines.append({"learning_rate": rate, "untrained_kl": 5.0})
        lines[-1] |= {"tokens": 1000 * (step + 1), "held_out_kl": kl} if step % 10 == 9 else {}
    handle = Store(tmp_path).handle(stage_of("recover", "m").id)
    for seen in (50, steps):
        handle.work.mkdir(parents=True, exist_ok=True)
        (handle.work / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:seen]))
        run = Run.read(handle)
        assert run.tokens == 1000 * seen
        assert Law.fitted(run.points).at(1_000_000)[0] == pytest.approx(3.0 * 500**-0.2, rel=0.02)


def test_reports_tell_it_of_each_row_also_while_it_trains_and_a_dry_run_of_longer_ones(tmp_path, monkeypatch):
    store, model = Store(tmp_path / "store"), Input("digest", "/model")
    prune = stage_of("prune", "m 0.2 hfprune", {}, {"model": model})
    stages = {
        name: stage_of("recover", f"m 0.2 hfprune + {name}", {"recovery": recipe}, {"model": prune.as_input()} | others)
        for name, recipe, others in (
            ("done", {"tokens": 300_000}, {}),
            ("running", {"rank": 4}, {}),
            ("broken", {"rank": 8}, {}),
            ("longer", {"tokens": 3_000_000}, {}),
            ("of other text", {"tokens": 3_000_000}, {"text": Input("another", "/text")}),
            ("of few steps", {"tokens": 3_000_000, "max_steps": 7}, {}),
        )
    }
    record = {"world_size": 2, "wall_time_s": 1800.0, "metrics": {"training_tokens": 300_000}}
    with being_made(store, stages["done"], **record) as draft:
        (draft / "loss.jsonl").write_text(lines_of(curve(LAWS[0])))
    for name, lines in {"running": lines_of(curve(LAWS[0], points=3)), "broken": "{"}.items():
        work = store.handle(stages[name].id).work
        work.mkdir(parents=True)
        (work / "loss.jsonl").write_text(lines)

    evaluations = {name: stage_of("evaluate", name, {}, {"model": stages[name].as_input()}) for name in stages}
    cells = [
        Cell(stage.label, "m", 0.2, "hfprune", "entropy", name, (prune.id, stage.id), evaluations[name].id)
        for name, stage in stages.items()
    ]
    planned = (prune, *stages.values(), *evaluations.values())
    plan = Plan({stage.id: stage for stage in planned}, tuple(cells))
    rows = collect_rows(plan, store, {"m": DenseModel(100, {})})
    assert [row["recovery"] for row in rows if row["outlook"]] == ["done", "running"] and len(rows) == len(stages)
    for text in (report(rows), page(tmp_path, plan, rows, written=0.0)):
        assert "m 0.2 hfprune + done: KL 0.500±0.00" in text and "after 3M tokens (10 device-hours)" in text
        assert "m 0.2 hfprune + running: too few points: by 3 points" in text
    assert outlook_of_planned(stages["longer"], store).startswith("KL 0.500±0.00")
    assert not any(outlook_of_planned(stages[name], store) for name in ("running", "of other text", "of few steps"))
    monkeypatch.setitem(KINDS, "recover", replace(KINDS["recover"], version=KINDS["recover"].version + 1))
    assert outlook_of_planned(stages["longer"], store) is None

"""What more training would give, by shorter trainings that follow a known law, and where that is told."""

import json
from dataclasses import replace

import numpy as np
import pytest
from made_stages import being_made, stage_of

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.report.page import page
from hfprune_dist.results.outlook import Law, Run, _until, foretold, outlook, read_runs
from hfprune_dist.results.rows import DenseModel, collect_rows
from hfprune_dist.results.table import report
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input

LAWS = [(0.3, 2.0, 0.5), (0.0, 1.5, 0.2), (0.5, 3.0, 1.0), (0.1, 1.0, 0.08)]
LENGTHS = (30_000, 90_000, 300_000)


def ends(law, lengths=LENGTHS, noise=0.0, seed=0):
    """Tokens -> KL at the end of trainings of these lengths, with relative noise."""
    floor, factor, exponent = law
    drawn = np.exp(noise * np.random.default_rng(seed).standard_normal(len(lengths)))
    return {D: (floor + factor * (D / 30_000) ** -exponent) * each for D, each in zip(lengths, drawn, strict=True)}


@pytest.mark.parametrize("known", LAWS)
@pytest.mark.parametrize("lengths", [LENGTHS, (10_000, *LENGTHS)])
def test_a_known_law_is_found_and_predicts_ten_times_as_far(known, lengths):
    floor, factor, exponent = known
    law, true = Law.fitted(ends(known, lengths)), floor + factor * 100.0**-exponent
    assert law.at(3_000_000) == pytest.approx(true, rel=0.001)
    assert law.tokens_to(floor + factor / 2) == pytest.approx(30_000 * 2 ** (1 / exponent), rel=0.01)
    assert law.tokens_to(0.9 * floor) == float("inf")


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_errors_are_as_large_as_they_are_said_to_be(noise):
    """One of them holds two predictions in three, and they are smaller with less noise."""
    within = []
    for floor, factor, exponent in LAWS:
        known, true = (floor, factor, exponent), floor + factor * 100.0**-exponent
        told = [foretold(ends(known, noise=noise, seed=seed), 3_000_000) for seed in range(40)]
        within.append(np.mean([abs(kl - true) < error for kl, error in told]))
    assert np.mean(within) > 0.68


def test_a_law_that_does_not_hold_has_a_large_error():
    """It falls by a law, and then not any more."""
    points = ends(LAWS[1])
    (_, held), (_, failed) = (foretold(each, 3_000_000) for each in (points, points | {300_000: points[90_000]}))
    assert failed > 10 * held


@pytest.mark.parametrize("kls", [(1.0, 1.0, 1.0), (1.0, 2.0, 4.0), (1e-9, 1e-9, 1e-6), (4.0, 1.0, 1e-9)])
def test_whatever_was_measured_gives_finite_numbers(kls):
    points = dict(zip(LENGTHS, kls, strict=True))
    assert np.isfinite(foretold(points, 3_000_000)).all() and Law.fitted(points).tokens_to(0.5) > 0


def test_what_was_measured_goes_before_what_the_law_says():
    """KL that rises a little, by noise or because all is learnt, has a law by which it never falls."""
    kls = dict(zip(LENGTHS, (1.0, 0.999, 1.001), strict=True))
    runs = [Run(tokens, kl, untrained=5.0, hours=1e-6) for tokens, kl in kls.items()]
    law = Law.fitted(kls)
    assert law.tokens_to(2.5) == float("inf") and _until(2.5, law, runs) == "after 30k tokens (0.03 device-hours)"
    for shortest in (30_000, 30):  # which doesn't make the law hold farther
        spread = [replace(runs[0], tokens=shortest), *runs[1:]]
        assert _until(0.9, law, spread) == "not within 30M tokens (30 device-hours)"


def test_reports_and_dry_runs_tell_it_of_recipes_with_three_lengths(tmp_path, monkeypatch):
    store, model = Store(tmp_path / "store"), Input("digest", "/model")
    prune = stage_of("prune", "m 0.2 hfprune", {}, {"model": model})

    def training(name, others=(), **recipe):
        inputs = {"model": prune.as_input(), **dict(others)}
        return stage_of("recover", f"m 0.2 hfprune + {name}", {"recovery": recipe}, inputs)

    def made(stage, tokens, kl):
        record = {"world_size": 2, "wall_time_s": tokens / 100, "metrics": {"training_tokens": tokens}}
        first, last = {"step": 1, "loss": 1.0, "untrained_kl": 5.0}, {"step": 2, "loss": 1.0}
        first |= {"tokens": 1, "held_out_kl": 0.1}
        with being_made(store, stage, **record) as draft:
            lines = [first, last | ({"tokens": tokens, "held_out_kl": kl} if kl else {})]
            (draft / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    for tokens, kl in ends(LAWS[0]).items():
        made(training("lora", tokens=tokens), tokens, kl)
    for tokens, kl in {**ends(LAWS[0], LENGTHS[:2]), 400_000: None, 500_000: -1e-9}.items():
        made(training("full", tokens=tokens, method="full"), tokens, kl)
    made(training("full", tokens=300_000, method="full", evaluate_every=1000, patience=1), 300_000, 0.2)  # ended early
    damaged = training("full", tokens=600_000, method="full")
    made(damaged, 600_000, 0.1)
    (store.handle(damaged.id).artifact / "loss.jsonl").write_text('{"st')
    stages = [
        training("lora", tokens=300_000),
        training("full", tokens=90_000, method="full"),
        training("lora on other text", {"text": Input("another", "/text")}.items(), tokens=300_000),
    ]
    evaluations = [stage_of("evaluate", stage.label, {}, {"model": stage.as_input()}) for stage in stages]
    cells = [
        Cell(stage.label, "m", 0.2, "hfprune", "entropy", stage.label, (prune.id, stage.id), evaluation.id)
        for stage, evaluation in zip(stages, evaluations, strict=True)
    ]
    planned = (prune, *stages, *evaluations)
    plan = Plan({stage.id: stage for stage in planned}, tuple(cells))
    rows = collect_rows(plan, store, {"m": DenseModel(100, {})})
    assert [bool(row["outlook"]) for row in rows] == [True, False, False]
    until = "half after 30k tokens (0.17 device-hours), 90 % after 3M tokens (17 device-hours)"
    for text in (report(rows), page(tmp_path, plan, rows, written=0.0)):
        assert "m 0.2 hfprune + lora: KL 0.500±" in text
        told = f" after 3M tokens (17 device-hours); of what pruning lost, regained: {until} (by 3 runs of 30k to 300k"
        assert told in text
    runs = read_runs(store)
    longer = training("lora", tokens=1_200_000)
    assert outlook(longer, runs, 1_200_000).startswith("KL 0.6") and outlook(longer, runs, 90_000) is None
    assert outlook(longer, runs, 1e9) is None, "too far ahead"
    alike = {
        recipe: [replace(run, tokens=300_000 + number) for number, run in enumerate(found)]
        for recipe, found in runs.items()
    }
    assert outlook(longer, alike, 600_000) is None, "of runs too much alike"
    monkeypatch.setitem(KINDS, "recover", replace(KINDS["recover"], version=KINDS["recover"].version + 1))
    assert not read_runs(store)

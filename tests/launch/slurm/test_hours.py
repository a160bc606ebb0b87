"""Hours of a plan's stages on a profile: how they change, what they add up to, and the tables in the README."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from hfprune_launch.slurm.hours import Total, plan_hours, show_hours, shown
from hfprune_launch.slurm.profile import Profile, Resources
from hfprune_launch.slurm.stage_jobs import gpus_of
from hypothesis import given, settings
from hypothesis import strategies as st
from published import SHAPES, published_model, published_plan
from ranks import ROOT
from rich.console import Console
from sweeps import make_inputs, planned

from hfprune_dist.planning.rates import ASSUMED, START_S
from hfprune_dist.store.stage import STAGE_VERSIONS

README = ROOT / "launch" / "slurm" / "README.md"
METHODS = ["hfprune", "surgeon-uniform-block", "surgeon-plain", "surgeon-plain-thorough"]
A100 = {"gpu_tflops": 312, "gpu_link_gbytes": 300, "network_gbits": 400}
H100 = {"gpu_tflops": 989, "gpu_link_gbytes": 450, "network_gbits": 400}
NODE = {"tasks_per_node": 8, "gpus_per_node": 8, "gpu_memory_gib": 80}


def profile_of(**resources):
    return Profile("drawn", dict.fromkeys(STAGE_VERSIONS, Resources(**{**NODE, **resources})), None)


def hours_of(models, methods, profile, **overrides):
    gpus = gpus_of(profile.resources["recover"])
    config, plan = published_plan(models, methods, gpus, **overrides)
    return plan_hours(plan, list(plan.stages), profile, config.runtime)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {name: published_model(folder, name) for name in SHAPES}


def seconds_by_stage(hours):
    return {each.stage.id: each.time.seconds for each in hours}


@given(
    nodes=st.integers(1, 3),
    per_node=st.integers(1, 8),
    tflops=st.floats(10, 2000),
    gbytes=st.floats(10, 900),
    gbits=st.floats(10, 800),
    by=st.floats(1, 20),
)
@settings(max_examples=5, deadline=None)
def test_no_stage_takes_longer_on_faster_gpus_or_networks(models, nodes, per_node, tflops, gbytes, gbits, by):
    rates = {"gpu_tflops": tflops, "gpu_link_gbytes": gbytes, "network_gbits": gbits}
    where = {"nodes": nodes, "tasks_per_node": per_node}
    fixed = {"recovery__micro_batch_size": 1, "recovery__batch_size": 24 * nodes * per_node}

    # Where micro-batches are set, rates don't change a plan.
    gpus = gpus_of(profile_of(**where, **rates).resources["recover"])
    config, plan = published_plan([models["llama-2-7b"]], METHODS, gpus, **fixed)

    def seconds(**changes):
        profile = profile_of(**where, **{**rates, **changes})
        return seconds_by_stage(plan_hours(plan, list(plan.stages), profile, config.runtime))

    before = seconds()
    assert all(it is not None and it >= START_S for it in before.values())
    for name, value in rates.items():
        after = seconds(**{name: value * by})
        assert all(after[stage] <= before[stage] for stage in before)


@given(samples=st.integers(16, 300), times=st.integers(2, 5), steps=st.integers(1, 300), micro_batch=st.integers(1, 5))
@settings(max_examples=5, deadline=None)
def test_more_windows_and_steps_take_longer_whatever_their_number(models, samples, times, steps, micro_batch):
    """This also holds where ranks have unequal shares of them."""

    def by_kind(**overrides):
        fixed = {"calibration__micro_batch_size": micro_batch, "recovery__micro_batch_size": 4}
        hours = hours_of([models["qwen2.5-1.5b"]], METHODS, profile_of(**A100), **fixed, **overrides)
        kinds = {each.stage.kind for each in hours}
        return {kind: sum(it.time.seconds for it in hours if it.stage.kind == kind) for kind in kinds}

    few = by_kind(calibration__samples=samples, recovery__max_steps=steps)
    many = by_kind(calibration__samples=times * samples, recovery__max_steps=times * steps)
    assert many["recover"] > few["recover"] and many["evaluate"] == few["evaluate"]
    assert many["importance"] >= few["importance"] and many["prune"] > few["prune"]


def test_a_total_is_the_sum_of_what_is_known(models):
    hours = hours_of([models["llama-2-7b"]], ["hfprune"], profile_of(**A100), recovery__dataset="someone/pairs")
    unknown = [each for each in hours if each.time.seconds is None]
    assert {each.stage.kind for each in unknown} == {"recover"}
    assert all("someone/pairs (recovery.samples or max_steps tells)" in each.time.missing for each in unknown)
    known = [each.time for each in hours if each.time.seconds is not None]
    total = Total.of(hours)
    assert total.known == len(known)
    assert total.hours == pytest.approx(sum(it.seconds for it in known) / 3600)
    assert total.gpu_hours == pytest.approx(8 * total.hours)


def test_gpus_without_a_rank_are_held_all_the_same(models):
    hours = hours_of([models["llama-2-7b"]], ["hfprune"], profile_of(tasks_per_node=4, **A100))
    assert {each.time.gpus for each in hours} == {8}
    assert Total.of(hours).gpu_hours == pytest.approx(8 * Total.of(hours).hours)


def test_hours_are_as_exact_as_they_are_short():
    assert [shown(it) for it in (None, 0.004, 9.99, 10, 1234.5)] == ["?", "0.00", "9.99", "10", "1,234"]


def test_whole_weights_save_what_gathers_take(models):
    """That is nearly all of training's time: a row's gathers and their starts take longer than its products."""

    def recovery(**overrides):
        hours = hours_of([models["llama-2-7b"]], ["hfprune"], profile_of(**H100), **overrides)
        return next(each.time.seconds for each in hours if each.stage.kind == "recover")

    assert recovery() < recovery(runtime__sharding="zero3") < recovery(**SHARDED)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("hours"))


def of_inputs(inputs, profile, **overrides):
    config, plan = planned(inputs, **overrides)
    return plan_hours(plan, list(plan.stages), profile, config.runtime)


def test_documents_that_nobody_knows_are_named_and_a_limit_counts_them(inputs):
    def evaluation(**overrides):
        hours = of_inputs(inputs, profile_of(**A100), **overrides)
        return next(each.time for each in hours if each.stage.kind == "evaluate")

    unknown, few, many = evaluation(), *(evaluation(evaluation__limit=it) for it in (100, 10**6))
    assert "tiny_choice (evaluation.limit bounds them)" in unknown.missing and unknown.seconds is not None
    assert few.missing == many.missing == "answers that a model writes for tiny_choice"
    assert unknown.seconds < few.seconds < many.seconds


def test_speed_is_counted_by_the_tokens_that_are_generated(inputs):
    def measurement(tokens):
        settings = {"efficiency__enabled": True, "efficiency__new_tokens": tokens, "efficiency__prompt_tokens": [8]}
        hours = of_inputs(inputs, profile_of(**A100), **settings)
        return next(each.time.seconds for each in hours if each.stage.kind == "efficiency")

    assert measurement(16) < measurement(256)


def test_what_the_profile_does_not_say_is_named(inputs):
    no_rate = of_inputs(inputs, profile_of())
    assert all(each.time.seconds is None and "gpu_tflops" in each.time.missing for each in no_rate)
    no_gpus = of_inputs(inputs, profile_of(gpus_per_node=0, **A100), methods=["hfprune"])
    known = {each.stage.kind for each in no_gpus if each.time.seconds is not None}
    assert known == {"prune"}, "copying files needs no GPU"
    assert all(each.time.gpus == 0 for each in no_gpus)


def test_hours_of_stages_that_memory_decides_on_need_it(inputs):
    def missing(**overrides):
        hours = of_inputs(inputs, profile_of(**A100 | {"gpu_memory_gib": None}), **overrides)
        return {it.stage.kind for it in hours if it.time.missing == "all of it: the profile has no gpu_memory_gib"}

    assert missing() == {"recover", "evaluate"}, "their weights may be whole, and layers run again or not"
    assert missing(runtime__sharding="zero3") == missing(runtime__sharding="replicate") == {"recover"}


def test_the_table_shows_every_stage_its_total_and_what_is_assumed(models):
    hours = hours_of([models["llama-2-7b"]], ["hfprune"], profile_of(**A100))
    screen = io.StringIO()
    show_hours(Console(file=screen, width=300), hours)
    text = screen.getvalue()
    assert "nothing here was measured" in text and ASSUMED in text
    rows = [line.split() for line in text.splitlines()]
    assert sum(row[:1] == ["importance"] for row in rows) == 1 and sum(row[:1] == ["evaluate"] for row in rows) == 4
    total = Total.of(hours)
    assert [row for row in rows if row[:1] == ["all"]] == [["all", shown(total.gpu_hours), shown(total.hours)]]
    screen = io.StringIO()
    unknown = replace(hours[0], time=replace(hours[0].time, seconds=None, missing="all of it"))
    show_hours(Console(file=screen, width=300), [unknown, *hours[1:]])
    assert "\nat least" in screen.getvalue() and "all of 1 stage" in screen.getvalue()
    screen = io.StringIO()
    show_hours(Console(file=screen), hours_of([models["llama-2-7b"]], ["hfprune"], profile_of(gpus_per_node=0)))
    assert screen.getvalue() == ""


# The README's tables.

SHARDED = {"runtime__sharding": "zero3", "recovery__micro_batch_size": 1}
COLUMNS = [
    ("7B, 8 A100", "llama-2-7b", 1, A100),
    ("13B, 8 A100", "llama-2-13b", 1, A100),
    ("70B, 16 A100", "llama-2-70b", 2, A100),
    ("7B, 8 H100", "llama-2-7b", 1, H100),
    ("13B, 8 H100", "llama-2-13b", 1, H100),
    ("70B, 16 H100", "llama-2-70b", 2, H100),
]
ROWS = {
    "importance, the paper's": ("hfprune", "importance", ""),
    "importance, `surgeon`, neurons": ("surgeon-uniform-block", "importance", ""),
    "importance, `surgeon`, KV groups too": ("surgeon-plain", "importance", ""),
    "prune 20 %, `hfprune`": ("hfprune", "prune", " 0.2"),
    "prune 20 %, `surgeon-uniform-block`": ("surgeon-uniform-block", "prune", " 0.2"),
    "prune 20 %, `surgeon-plain`": ("surgeon-plain", "prune", " 0.2"),
    "prune 20 %, `surgeon-plain-thorough`": ("surgeon-plain-thorough", "prune", " 0.2"),
    "recovery, the dense model": ("hfprune", "recover", " dense"),
    "recovery, 20 % pruned": ("hfprune", "recover", " 0.2"),
    "evaluation, 20 % pruned": ("hfprune", "evaluate", " 0.2 + lora"),
}
PAPER = ["llama-2-7b", "llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b"]
SWEEPS = {
    "its 7B model, `hfprune`": (PAPER[:1], ["hfprune"]),
    "its 7B model, both methods": (PAPER[:1], ["hfprune", "surgeon-plain"]),
    "all of it, `hfprune`": (PAPER, ["hfprune"]),
    "all of it, both methods": (PAPER, ["hfprune", "surgeon-plain"]),
}


def table_of(header, rows):
    bar = "|---|" + "---:|" * (len(header) - 1)
    head, *body = (f"| {' | '.join(line)} |" for line in [header, *rows])
    return "\n".join([head, bar, *body])


def stages_table(models):
    found = {
        (column, method): {
            (each.stage.kind, each.stage.label): each.time.hours
            for each in hours_of([models[name]], [method], profile_of(nodes=nodes, **gpu))
        }
        for column, name, nodes, gpu in COLUMNS
        for method in {it[0] for it in ROWS.values()}
    }
    rows = [
        [title, *(shown(found[column, method][kind, name + label]) for column, name, _, _ in COLUMNS)]
        for title, (method, kind, label) in ROWS.items()
    ]
    return table_of(["hours", *(column for column, *_ in COLUMNS)], rows)


def sweeps_table(models):
    def total(names, methods, gpu, **overrides):
        return shown(Total.of(hours_of([models[it] for it in names], methods, profile_of(**gpu), **overrides)).hours)

    header = ["hours of `paper.yaml`", "8 A100", "8 H100", "8 H100, always ZeRO-3, micro-batch 1"]
    rows = [
        [title, total(*sweep, A100), total(*sweep, H100), total(*sweep, H100, **SHARDED)]
        for title, sweep in SWEEPS.items()
    ]
    return table_of(header, rows)


@pytest.mark.parametrize("table", [stages_table, sweeps_table])
def test_the_tables_in_the_readme_are_what_the_code_computes(models, table):
    computed = table(models)
    assert computed in README.read_text(), f"replace the table in {README} by\n{computed}"


def test_assumptions_in_the_readme_are_those_of_the_code():
    prose = " ".join(README.read_text().split())
    assert re.sub(r"^assumed: ", "", ASSUMED) in prose, f"say in {README}: {ASSUMED}"


def test_loraprune_takes_what_recovery_takes_and_its_scores(models):
    def of(**overrides):
        hours = hours_of([models["llama-2-7b"]], ["loraprune"], profile_of(**A100), ratios=[0.2], **overrides)
        return {each.stage.kind: each.time.seconds for each in hours if each.stage.kind in ("recover", "loraprune")}

    unknown = of(recovery__dataset="someone/pairs")
    assert set(unknown.values()) == {None}
    whole, sharded = of(), of(**SHARDED)
    assert 1 < whole["loraprune"] / whole["recover"] < 1.2
    assert sharded["loraprune"] - sharded["recover"] > whole["loraprune"] - whole["recover"], "weights are gathered"

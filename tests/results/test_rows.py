"""Rows from artifacts, and the files that they are written to."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
from headers import CONFIG, checkpoint_of, tensors_of
from made_stages import being_made, failed, stage_of
from rows import efficiency, shown

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.checkpoints import Contents, update_checkpoints
from hfprune_dist.results.rows import DenseModel, collect_rows
from hfprune_dist.results.table import MEASURED_OTHERWISE, flat_row, not_comparable, write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input
from hfprune_dist.structures.experts import EXPERT_COUNT_KEYS, SHARED_WIDTHS

MODEL = Input("digest", "/model")
IMPORTANCE = stage_of("importance", "m", {}, {"model": MODEL})
PRUNE = stage_of("prune", "m 0.2", {"ratio": 0.2}, {"model": MODEL, "importance": IMPORTANCE.as_input()})
DENSE_EVALUATE = stage_of("evaluate", "m dense", {}, {"model": MODEL})
EVALUATE = stage_of("evaluate", "m 0.2", {}, {"model": PRUNE.as_input()})
STAGES = (IMPORTANCE, PRUNE, DENSE_EVALUATE, EVALUATE)
PLAN = Plan(
    {stage.id: stage for stage in STAGES},
    (
        Cell("m dense", "m", None, None, None, "none", (), DENSE_EVALUATE.id),
        Cell("m 0.2", "m", 0.2, "hfprune", "entropy", "none", (IMPORTANCE.id, PRUNE.id), EVALUATE.id),
    ),
)
DENSE = {"m": DenseModel(100, {"intermediate_size": 48}, 400)}
SCORES = {
    "fidelity": {"perplexity": 12.5, "kl": 0.25, "top1_agreement": 0.75},
    "other_texts": {"news": {"kl": 0.5, "kl_stderr": 0.125}},
    "tasks": {
        "piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": 0.1},
        "wikitext": {"word_perplexity": 30.25, "word_perplexity_stderr": None},
    },
}


MADE = {"git_commit": "abc", "packages": {"torch": "2.6"}}


def commit(store, stage, files=None, record=None, **metrics):
    costs = {"world_size": 1, "wall_time_s": 2.0, "peak_memory_bytes": 100 + len(stage.kind), "provenance": MADE}
    with being_made(store, stage, metrics=metrics, **costs | (record or {})) as draft:
        for name, content in (files or {}).items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(content)


@pytest.fixture
def store(tmp_path):
    """A store with all artifacts but the pruned model's evaluation."""
    store = Store(tmp_path / "store")
    commit(store, DENSE_EVALUATE, **SCORES)
    commit(store, IMPORTANCE, record={"world_size": 4})
    weights = {"model-1.safetensors": "12", "model-2.safetensors": "345", "adapter/adapter_model.safetensors": "6789"}
    sizes = {"ratio_reached": 0.21, "parameters": 79, "intermediate_size": 15}
    trained = {"training_tokens": 10, "flops_per_token": 3}
    commit(store, PRUNE, weights, {"world_size": 4}, **sizes, **trained)
    return store


def test_a_finished_cell_shows_what_was_measured(store):
    record = {"finished": 1.7e9, "config": {"seed": 3}, "device": "cpu", "wall_time_s": 7.0}
    commit(store, EVALUATE, record=record, **SCORES)
    dense, pruned = collect_rows(PLAN, store, DENSE)
    expected = {
        "ratio": 0.2,
        "ratio_reached": 0.21,
        "parameters": 79,
        "intermediate_size": 15,
        "weight_bytes": 5,
        "average": 0.6,
        "average_stderr": 0.1,
        "own_time_s": 11.0,
        "wall_time_s": 11.0,
        "peak_memory_bytes": 110,
        "checkpoint": f"store/{PRUNE.id}",
        "training_tokens": 10,
        "training_flops": 30,
        "device_hours": 4 * 4 / 3600,
        "status": "done",
        "cause": None,
        "stages": {IMPORTANCE.id: 2.0, PRUNE.id: 2.0, EVALUATE.id: 7.0},
        "provenance": {"date": "2023-11-14T22:13:20+00:00", "seed": 3, "device": "cpu", **MADE},
    }
    assert {name: pruned[name] for name in expected} == expected
    expected = {"ratio": 0.0, "ratio_reached": 0.0, "parameters": 100, "intermediate_size": 48, "weight_bytes": 400}
    expected |= {"own_time_s": 2.0, "checkpoint": None, "device_hours": 0, "measured_as": pruned["measured_as"]}
    assert {name: dense[name] for name in expected} == expected


def test_a_row_made_by_other_versions_of_libraries_is_told_apart(store):
    other = {"provenance": {"packages": {"torch": "2.6.1"}}}
    commit(store, EVALUATE, record=other, **SCORES)
    rows = collect_rows(PLAN, store, DENSE)
    assert not_comparable(rows) == [f"{MEASURED_OTHERWISE}: m 0.2"]
    assert not not_comparable([{**row, "status": "missing"} for row in rows]), "what has no scores isn't compared"


def test_a_row_names_the_folder_of_its_checkpoint(store):
    """Nobody can load a checkpoint that isn't there; a row without its evaluation names its checkpoint all the same."""
    contents = Contents(PRUNE.id, store.handle(PRUNE.id).artifact, {}, {"README.md": "a card"})
    update_checkpoints(store.root.parent, {"m-0.2-hfprune": contents})
    assert collect_rows(PLAN, store, DENSE)[1]["checkpoint"] == "checkpoints/m-0.2-hfprune"
    update_checkpoints(store.root.parent, {"m-0.2-hfprune": replace(contents, checkpoint="prune/another")})
    assert collect_rows(PLAN, store, DENSE)[1]["checkpoint"] == f"store/{PRUNE.id}"
    store.handle(PRUNE.id).discard()
    (_, pruned) = collect_rows(PLAN, store, DENSE)
    assert pruned["status"] == "missing" and pruned["checkpoint"] is None


def test_sizes_of_experts_have_columns(store):
    (number, *_), (shared, *_) = EXPERT_COUNT_KEYS, SHARED_WIDTHS
    config = CONFIG | {"num_hidden_layers": 2, "intermediate_size": 24, "num_experts_per_tok": 1, number: 4, shared: 40}
    named = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    shapes = tensors_of(config | named | {"first_k_dense_replace": 0})
    dense = {"m": DenseModel.from_checkpoint(checkpoint_of(config, shapes))}
    store.handle(PRUNE.id).discard()
    commit(store, PRUNE, **{number: 3, shared: 39})
    found = shown(collect_rows(PLAN, store, dense), wide=True)
    assert (found["experts"], found["shared expert width"]) == (("4", "3"), ("40", "39"))


def test_a_missing_cell_is_missing_and_says_why(store):
    _, pruned = collect_rows(PLAN, store, DENSE)
    assert pruned["status"] == "missing" and pruned["cause"] == "evaluate has not run yet"
    assert pruned["kl"] is None and pruned["average"] is None and pruned["wall_time_s"] is None
    failed(store, EVALUATE, "input", "first line\nlast line")
    _, pruned = collect_rows(PLAN, store, DENSE)
    assert (pruned["status"], pruned["cause"]) == ("failed", "evaluate failed (input): first line")


def test_a_row_stands_without_its_speed(store):
    commit(store, EVALUATE, **SCORES)
    measured = stage_of("efficiency", "m 0.2", {}, {"model": PRUNE.as_input(), "dense": MODEL})
    cells = (PLAN.cells[0], replace(PLAN.cells[1], efficiency=measured.id))
    plan = Plan({**PLAN.stages, measured.id: measured}, cells)
    failed(store, measured, "code", "out of memory\nat last")
    _, row = collect_rows(plan, store, DENSE)
    assert (row["status"], row["kl"], row["own_time_s"]) == ("done", 0.25, 6.0) and "decode_speed" not in row
    assert row["cause"] == "no speed: efficiency failed (code): out of memory"
    commit(store, measured, **efficiency(1.5, tokens_per_s=30.0, seconds=0.1))
    _, row = collect_rows(plan, store, DENSE)
    assert (row["decode_speed"], row["decode_tokens_per_s"], row["cause"]) == (1.5, 30.0, None)
    assert row["efficiency"].keys() == {"engine", "device", "threads", "cores", "model", "runs"}
    assert flat_row(row)["efficiency/batch 1, 32 in, 16 out/decode_speed"] == 1.0


def test_a_row_has_what_a_check_found_and_stands_without_it(store):
    commit(store, EVALUATE, **SCORES)
    checked = stage_of("check", "m 0.2", {}, {"model": PRUNE.as_input()})
    plan = Plan({**PLAN.stages, checked.id: checked}, (PLAN.cells[0], replace(PLAN.cells[1], check=checked.id)))
    failed(store, checked, "input", "no vllm")
    dense, row = collect_rows(plan, store, DENSE)
    assert (row["status"], row["engines"], row["cause"]) == ("done", {}, "no check: check failed (input): no vllm")
    found = {"version": "vllm 1", "difference": 2e-5, "equal": 60, "tokens": 60, "failure": ""}
    commit(store, checked, engines={"vllm": found})
    _, row = collect_rows(plan, store, DENSE)
    assert (row["engines"], row["cause"], dense["engines"]) == ({"vllm": found}, None, {})
    assert flat_row(row)["engines/vllm/difference"] == 2e-5


def test_a_result_stands_when_a_pass_behind_it_is_made_again(store):
    """It may be made again for a further criterion, for example; its cost is not known yet."""
    commit(store, EVALUATE, **SCORES)
    store.handle(IMPORTANCE.id).discard()
    _, row = collect_rows(PLAN, store, DENSE)
    assert (row["status"], row["cause"], row["kl"], row["parameters"]) == ("done", None, 0.25, 79)
    assert row["wall_time_s"] is row["peak_memory_bytes"] is row["device_hours"] is None
    shutil.rmtree(store.handle(PRUNE.id).artifact)
    assert collect_rows(PLAN, store, DENSE)[1]["status"] == "missing", "without a checkpoint there is no row"


def test_files_hold_every_metric_and_agree(store, tmp_path):
    rows = collect_rows(PLAN, store, DENSE)
    write_reports(rows, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as stream:
        dense, pruned = csv.DictReader(stream)
    assert (dense["piqa/acc_norm_stderr"], dense["fidelity/news/kl"], pruned["kl"]) == ("0.1", "0.5", "")
    assert pruned["cause"] == "evaluate has not run yet"
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    lines = (tmp_path / "results.md").read_text().splitlines()
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(tables[:4])) == len(set(tables[4:])) == 1 and len(tables) == 8
    assert "- missing: m 0.2: evaluate has not run yet" in lines


def test_rows_share_times_and_say_how_they_were_measured(store):
    """Two ratios share a pass; an evaluation of other documents is another one."""
    half = {"tasks": {"piqa": {"acc": 0.3}}}
    commit(store, EVALUATE, **half)
    other = stage_of("evaluate", "m 0.2, few", {"limit": 3}, {"model": PRUNE.as_input()})
    commit(store, other, **half)
    plan = Plan({**PLAN.stages, other.id: other}, (*PLAN.cells, replace(PLAN.cells[1], ratio=0.3, evaluate=other.id)))
    dense, pruned, few = collect_rows(plan, store, DENSE)
    assert [(row["own_time_s"], row["wall_time_s"]) for row in (dense, pruned, few)] == [(2, 2), (2, 6), (2, 6)]
    assert dense["measured_as"] == pruned["measured_as"] != few["measured_as"]

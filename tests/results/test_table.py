import csv
import json
import shutil

import pytest

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.table import DenseModel, collect_rows, markdown, table, write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.heartbeat import Failure, write_failure_record
from hfprune_dist.store.stage import Input, Stage

MODEL = Input("digest", "/model")
IMPORTANCE = Stage("importance", "m", {}, {"model": MODEL})
PRUNE = Stage("prune", "m 0.2", {"ratio": 0.2}, {"model": MODEL, "importance": IMPORTANCE.as_input()})
DENSE_EVALUATE = Stage("evaluate", "m dense", {}, {"model": MODEL})
EVALUATE = Stage("evaluate", "m 0.2", {}, {"model": PRUNE.as_input()})
STAGES = (IMPORTANCE, PRUNE, DENSE_EVALUATE, EVALUATE)
PLAN = Plan(
    {stage.id: stage for stage in STAGES},
    (
        Cell("m dense", "m", None, None, None, "none", (), DENSE_EVALUATE.id),
        Cell("m 0.2", "m", 0.2, "hfprune", "entropy", "none", (IMPORTANCE.id, PRUNE.id), EVALUATE.id),
    ),
)
DENSE = {"m": DenseModel(100, 48)}
SCORES = {
    "fidelity": {"perplexity": 12.5, "kl": 0.25, "top1_agreement": 0.75},
    "tasks": {
        "piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": 0.1},
        "crows_pairs_english": {"pct_stereotype": 0.7, "pct_stereotype_stderr": 0.01},
        "wikitext": {"word_perplexity": 30.25, "word_perplexity_stderr": None},
    },
}


def commit(store, stage, **metrics):
    draft = store.open_draft(stage.id)
    store.commit(stage, draft, {"metrics": metrics, "wall_time_s": 2.0, "peak_memory_bytes": 100 + len(stage.kind)})


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    commit(store, DENSE_EVALUATE, **SCORES)
    commit(store, IMPORTANCE)
    commit(store, PRUNE, ratio_reached=0.21, parameters=79, intermediate_size=15)
    return store


def test_a_finished_cell_shows_what_was_measured(store):
    commit(store, EVALUATE, **SCORES)
    dense, pruned = collect_rows(PLAN, store, DENSE)
    assert (dense["parameters"], dense["ratio_reached"], dense["wall_time_s"]) == (100, 0.0, 2.0)
    assert (pruned["parameters"], pruned["ratio_reached"], pruned["intermediate_size"]) == (79, 0.21, 15)
    assert pruned["peak_memory_bytes"] == 110, "the importance pass's, the longest name here"
    assert pruned["wall_time_s"] == 6.0 and pruned["checkpoint"].endswith(PRUNE.id)
    assert pruned["average"] == pytest.approx(0.65)
    assert pruned["average_without_crows_pairs"] == pytest.approx(0.6)


def test_a_missing_cell_is_missing_and_says_why(store):
    _, pruned = collect_rows(PLAN, store, DENSE)
    assert pruned["status"] == "missing" and pruned["cause"] == "evaluate has not run yet"
    assert pruned["kl"] is None and pruned["average"] is None and pruned["wall_time_s"] is None
    store.work(EVALUATE.id).mkdir(parents=True)
    write_failure_record(store.work(EVALUATE.id), Failure("input", "first line\nlast line", 0, 0.0))
    _, pruned = collect_rows(PLAN, store, DENSE)
    assert pruned["cause"] == "evaluate failed (input): last line"


def test_a_result_stands_when_a_pass_behind_it_is_made_again(tmp_path):
    """For a further criterion, say; what it will cost is not known yet."""
    store = Store(tmp_path)
    commit(store, PRUNE, ratio_reached=0.2, parameters=80, intermediate_size=38)
    commit(store, EVALUATE, **SCORES)
    _, row = collect_rows(PLAN, store, DENSE)
    assert (row["status"], row["cause"], row["kl"], row["parameters"]) == ("done", None, 0.25, 80)
    assert row["wall_time_s"] is None and row["peak_memory_bytes"] is None
    shutil.rmtree(store.path(PRUNE.id))
    assert collect_rows(PLAN, store, DENSE)[1]["status"] == "missing", "without a checkpoint there is no row"


def test_a_cell_that_waits_names_what_failed_before_it(tmp_path):
    store = Store(tmp_path)
    store.work(IMPORTANCE.id).mkdir(parents=True)
    write_failure_record(store.work(IMPORTANCE.id), Failure("killed", "a rank died", -1, 0.0))
    _, pruned = collect_rows(PLAN, store, DENSE)
    assert pruned["cause"] == "importance failed (killed): a rank died"
    assert pruned["parameters"] is None


def test_files_hold_every_metric_and_agree(store, tmp_path):
    rows = collect_rows(PLAN, store, DENSE)
    write_reports(rows, tmp_path)
    with (tmp_path / "results.csv").open(newline="") as stream:
        flat = list(csv.DictReader(stream))
    assert flat[0]["piqa/acc_norm_stderr"] == "0.1" and flat[0]["crows_pairs_english/pct_stereotype"] == "0.7"
    assert flat[1]["kl"] == "" and flat[1]["cause"] == "evaluate has not run yet"
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows


def test_the_table_shows_headlines_and_both_averages(store):
    headers, body = table(collect_rows(PLAN, store, DENSE))
    shown = dict(zip(headers, body[0], strict=True))
    assert (shown["piqa"], shown["crows_pairs_english"], shown["wikitext"]) == ("60.0", "70.0", "30.25")
    assert (shown["avg"], shown["avg w/o crows"], shown["KL"]) == ("65.0", "60.0", "0.2500")
    lines = markdown(collect_rows(PLAN, store, DENSE)).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and "missing: evaluate has not run yet" in lines[3]


def test_a_damaged_manifest_is_a_missing_result(store):
    write_json(store.path(DENSE_EVALUATE.id) / "manifest.json", [])
    dense, _ = collect_rows(PLAN, store, DENSE)
    assert dense["status"] == "missing" and dense["perplexity"] is None

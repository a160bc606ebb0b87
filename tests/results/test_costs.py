"""The cost of training a row, from manifests and attempts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.config.parameters import RecoverParameters
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.costs import MEASURES, CostTable, device_hours
from hfprune_dist.results.rows import DenseModel, collect_rows
from hfprune_dist.results.table import flat_row, write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempt import Attempt
from hfprune_dist.store.stage import Input, Stage

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        number=st.integers(1, 9),
        state=st.sampled_from(["done", "failed", "open"]),
        started=st.none() | st.floats(0, 1e6),
        ended=st.none() | st.floats(0, 1e6),
        cause=st.sampled_from(["", "interrupted", "killed"]),
        ranks=st.none() | st.integers(1, 64),
    )
)


@given(attempts=ATTEMPTS, seconds=st.floats(0, 1e6), ranks=st.integers(1, 64))
def test_hours_are_of_all_attempts_and_wasted_ones_of_those_that_failed(attempts, seconds, ranks):
    total, wasted = device_hours({"wall_time_s": seconds, "world_size": ranks}, attempts)
    assert total >= wasted >= 0 and total - wasted >= seconds * ranks / 3600 - 1e-6
    lost = [it for it in attempts if it.state == "failed" and None not in (it.started, it.ended)]
    spent = {it: max(0.0, it.ended - it.started) * (it.ranks or ranks) / 3600 for it in lost}
    assert total == pytest.approx(seconds * ranks / 3600 + sum(spent[it] for it in lost))
    assert wasted == pytest.approx(sum(spent[it] for it in lost if it.cause != "interrupted"))
    assert device_hours({"wall_time_s": seconds}, attempts) == (None, None), "of an artifact that tells no ranks"


def test_hours_of_an_attempt_that_saved_its_work_count_but_are_not_wasted():
    attempts = [
        Attempt(number=1, state="failed", started=0.0, ended=3600.0, cause="interrupted", ranks=2),
        Attempt(number=2, state="failed", started=0.0, ended=7200.0, cause="killed", ranks=None),
        Attempt(number=3, state="done", started=0.0, ended=9000.0, cause="", ranks=8),
    ]
    assert device_hours({"wall_time_s": 1800.0, "world_size": 4}, attempts) == (0.5 * 4 + 1 * 2 + 2 * 4, 2 * 4)


@pytest.fixture
def sweep(tmp_path):
    """Two ratios that share a pass, the first of which is also recovered; and the dense model's own row."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    model = Input("digest", str(tmp_path / "model"))
    calibration = {"samples": 4, "sequence_length": 8, "micro_batch_size": 1, "shard_size": 1, "text_field": "text"}
    scored = {"calibration": {**calibration, "settled": None}, "criteria": ["entropy"], "dtype": "float32"}
    importance = Stage("importance", "m", {**scored, "add_bos_token": True, "seed": 0}, {"model": model})
    cut = {"criterion": "entropy", "allocation": "uniform", "refit": "none", "multiple_of": 1}
    inputs = {"model": model, "importance": importance.as_input()}
    cuts = [Stage("prune", f"m {ratio}", {**cut, "ratio": ratio}, inputs) for ratio in (0.2, 0.4)]
    recovery = RecoveryConfig(path="/text", sequence_length=16, batch_size=2)
    settings = RecoverParameters(recovery=recovery, seed=0).to_json()
    recover = Stage("recover", "m 0.2", settings, {"model": cuts[0].as_input()})
    sources = [model, recover.as_input(), cuts[1].as_input()]
    scores = [Stage("evaluate", str(number), {}, {"model": source}) for number, source in enumerate(sources)]
    recovered = importance.id, cuts[0].id, recover.id
    cells = (
        Cell("m dense", "m", None, None, None, "none", (), scores[0].id),
        Cell("m 0.2 + lora", "m", 0.2, "hfprune", "entropy", "lora", recovered, scores[1].id),
        Cell("m 0.4", "m", 0.4, "hfprune", "entropy", "none", (importance.id, cuts[1].id), scores[2].id),
    )
    stages = (importance, *cuts, recover, *scores)
    store = Store(tmp_path / "store")
    metrics = {
        "importance": {"tokens": 32},
        "prune": {"intermediate_size": 20, "intermediate_sizes": [20, 20], "ratio_reached": 0.2, "parameters": 100},
        "recover": {"training_tokens": 96, "flops_per_token": 5},
    }
    for stage in stages:
        record = {"metrics": metrics.get(stage.kind, {}), "wall_time_s": 3600.0, "world_size": 2, "device": "cpu"}
        store.commit(stage, store.open_draft(stage.id), {**record, "peak_memory_bytes": 1})
    return Plan({stage.id: stage for stage in stages}, cells), store


def rows_of(sweep, attempts_of=lambda _: ()):
    plan, store = sweep
    return collect_rows(plan, store, {"m": DenseModel(100, 32)}, attempts_of)


def test_own_costs_and_shared_ones_are_apart(sweep):
    dense, recovered, pruned = rows_of(sweep)
    hours = [(row["own_training_device_hours"], row["shared_training_device_hours"]) for row in rows_of(sweep)]
    assert hours == [(0, 0), (4.0, 2.0), (2.0, 2.0)], "evaluations are none of it"
    assert (recovered["own_training_tokens"], recovered["shared_training_tokens"]) == (96, 0)
    assert pruned["own_training_flops"] == 0 == dense["own_training_flops"]
    assert recovered["own_training_flops"] == 5 * 96
    assert recovered["costs"].keys() == {"importance", "prune", "recover"} and dense["costs"] == {}
    for measure in MEASURES:
        whole = recovered[f"own_training_{measure}"] + recovered[f"shared_training_{measure}"]
        assert sum(cost[measure] for cost in recovered["costs"].values()) == whole
    assert (recovered["training_device"], dense["training_device"]) == ("cpu", None)


def test_attempts_that_failed_are_wasted(sweep):
    failed = Attempt(1, "failed", 0.0, 1800.0, "killed", ranks=4)
    _, recovered, pruned = rows_of(sweep, lambda stage: [failed] if stage.kind == "recover" else [])
    assert recovered["own_training_wasted_device_hours"] == 2.0 and recovered["own_training_device_hours"] == 6.0
    assert pruned["own_training_wasted_device_hours"] == 0.0


def test_what_is_not_known_has_no_cost(sweep):
    plan, store = sweep
    importance = next(iter(plan.stages.values()))
    store.discard(importance.id)
    _, recovered, _ = rows_of(sweep)
    assert recovered["shared_training_device_hours"] is None and recovered["costs"]["importance"]["tokens"] is None


def test_files_have_all_costs(sweep, tmp_path):
    rows = rows_of(sweep)
    flat = flat_row(rows[1])
    assert flat["training/recover/flops"] == rows[1]["own_training_flops"] and "costs" not in flat
    write_reports(rows, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    assert "training cost, without evaluation" in (tmp_path / "results.md").read_text()


def test_a_reference_is_part_of_its_distillation():
    table = CostTable(
        {"reference/a": dict.fromkeys(MEASURES, 1.0), "distill/b": dict.fromkeys(MEASURES, 2.0)},
        {"reference/a": "cuda", "distill/b": "cpu"},
        shared=set(),
    )
    cell = Cell("m", "m", 0.2, "x", "entropy", "none", ("reference/a", "distill/b"), "evaluate/c")
    told = table.of_row(cell)
    assert told["costs"] == {"distill": dict.fromkeys(MEASURES, 3.0)} and told["training_device"] == "cuda, cpu"


def test_every_other_kind_of_training_stands_for_itself():
    stage_ids = tuple(f"{kind}/a" for kind in ("importance", "prune", "distill", "recover", "loraprune"))
    costs = {stage_id: dict.fromkeys(MEASURES, 1.0) for stage_id in stage_ids}
    table = CostTable(costs, dict.fromkeys(stage_ids), shared=set(stage_ids))
    told = table.of_row(Cell("m", "m", 0.2, "x", "entropy", "none", stage_ids, "evaluate/c"))
    assert [f"{kind}/a" for kind in told["costs"]] == [*stage_ids]
    assert told["shared_training_tokens"] == 5.0 and told["own_training_tokens"] == 0

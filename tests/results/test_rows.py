import csv
import json
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
from families import save_model
from headers import CONFIG, checkpoint_of, tensors_of
from made_stages import stage_of
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.checkpoints import Contents, update_checkpoints
from hfprune_dist.results.markdown import cells
from hfprune_dist.results.rows import DenseModel, collect_rows
from hfprune_dist.results.table import columns, flat_row, write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.heartbeat import Failure, write_failure_record
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
DENSE = {"m": DenseModel(100, 48)}
SCORES = {
    "fidelity": {"perplexity": 12.5, "kl": 0.25, "top1_agreement": 0.75},
    "tasks": {
        "piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "acc_norm_stderr": 0.1},
        "crows_pairs_english": {"pct_stereotype": 0.7, "pct_stereotype_stderr": 0.01},
        "wikitext": {"word_perplexity": 30.25, "word_perplexity_stderr": None},
    },
}


def commit(store, stage, files=None, record=None, **metrics):
    draft = store.open_draft(stage.id)
    for name, content in (files or {}).items():
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_text(content)
    costs = {"wall_time_s": 2.0, "peak_memory_bytes": 100 + len(stage.kind)}
    store.commit(stage, draft, {"metrics": metrics, **costs, **(record or {})})


def table(rows):
    """Return the headers and cells of all columns."""
    shown = columns(rows, wide=True)
    return [it.header for it in shown], cells(rows, shown)


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
    assert (dense["ratio"], pruned["ratio"], pruned["weight_bytes"]) == (0.0, 0.2, None)
    assert (pruned["parameters"], pruned["ratio_reached"], pruned["intermediate_size"]) == (79, 0.21, 15)
    assert pruned["peak_memory_bytes"] == 110, "the importance pass's, the longest name here"
    assert pruned["wall_time_s"] == 6.0 and pruned["checkpoint"].endswith(PRUNE.id)
    assert pruned["average"] == pytest.approx(0.65)
    assert pruned["average_without_crows_pairs"] == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["prune", "loraprune"])
def test_a_row_has_the_shape_of_its_last_cut(store, kind):
    last = stage_of(kind, "m 0.3", {"ratio": 0.3}, {"model": PRUNE.as_input()})
    evaluate = stage_of("evaluate", "m 0.3", {}, {"model": last.as_input()})
    commit(store, last, {"model.safetensors": "123"}, ratio_reached=0.3, parameters=70, intermediate_size=9)
    cell = replace(PLAN.cells[1], producers=(*PLAN.cells[1].producers, last.id), evaluate=evaluate.id)
    (row,) = collect_rows(Plan({**PLAN.stages, last.id: last, evaluate.id: evaluate}, (cell,)), store, DENSE)
    assert (row["parameters"], row["ratio_reached"], row["intermediate_size"]) == (70, 0.3, 9)
    assert row["checkpoint"].endswith(last.id) and row["weight_bytes"] == 3


def test_what_is_known_of_a_dense_model_comes_back_from_its_record(tmp_path):
    checkpoint = open_checkpoint(save_model(tmp_path, "llama"))
    facts = DenseModel.of(checkpoint)
    assert facts.weight_bytes is not None
    assert DenseModel(**json.loads(json.dumps(asdict(facts)))) == facts


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_the_size_of_a_dense_model_is_counted_as_that_of_a_pruned_one(tmp_path, store, size):
    """Files, whose headers and tensors that the model doesn't compute with count."""
    folder = save_model(tmp_path / "m", "llama")
    resaved = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    resaved.save_pretrained(folder, max_shard_size=size)
    last = sorted(folder.glob("*.safetensors"))[-1]
    save_file({**load_file(last), "zz.inv_freq": np.ones(7, np.float32)}, last, {"format": "pt"})
    if (index := folder / "model.safetensors.index.json").exists():
        told = json.loads(index.read_text())
        index.write_text(json.dumps(told | {"weight_map": {**told["weight_map"], "zz.inv_freq": last.name}}))
    weights = {it.name: it.read_bytes() for it in folder.glob("*.safetensors")}
    commit(store, PRUNE, {name: "x" * len(content) for name, content in weights.items()})
    dense, pruned = collect_rows(PLAN, store, {"m": DenseModel.of(open_checkpoint(folder))})
    assert dense["weight_bytes"] == pruned["weight_bytes"] and (len(weights) > 1) == (size == "20KB")


def test_a_row_names_the_folder_of_its_checkpoint(store):
    """Nobody can load a checkpoint that isn't there; a row without its evaluation names its checkpoint all the same."""
    assert collect_rows(PLAN, store, DENSE)[1]["checkpoint"] == f"store/{PRUNE.id}"
    contents = Contents(PRUNE.id, store.path(PRUNE.id), {}, {"README.md": "a card"})
    update_checkpoints(store.root.parent, {"m-0.2": contents})
    assert collect_rows(PLAN, store, DENSE)[1]["checkpoint"] == "checkpoints/m-0.2"
    update_checkpoints(store.root.parent, {"m-0.2": replace(contents, checkpoint="prune/another")})
    assert collect_rows(PLAN, store, DENSE)[1]["checkpoint"] == f"store/{PRUNE.id}"
    store.discard(PRUNE.id)
    (_, pruned) = collect_rows(PLAN, store, DENSE)
    assert pruned["status"] == "missing" and pruned["checkpoint"] is None


def test_what_more_than_neurons_lost_has_columns(store):
    more = {"num_hidden_layers": 5, "num_key_value_heads": None, "num_key_value_heads_by_layer": [1, 3]}
    headers, _ = table(collect_rows(PLAN, store, DENSE))
    assert "width" in headers and "layers" not in headers and "KV heads" not in headers
    again = Store(store.root.parent / "again")
    commit(again, PRUNE, ratio_reached=0.21, parameters=79, intermediate_size=15, **more)
    dense, pruned = collect_rows(PLAN, again, DENSE)
    assert not dense.keys() & more.keys() and more.items() <= pruned.items()
    headers, (first, second) = table([dense, pruned])
    assert [second[headers.index(name)] for name in ("layers", "KV heads", "width")] == ["5", "1-3", "15"]
    assert [first[headers.index(name)] for name in ("layers", "KV heads", "width")] == ["-", "-", "48"]
    assert "num_key_value_heads_by_layer" not in flat_row(pruned)


@pytest.mark.parametrize("number", EXPERT_COUNT_KEYS)
@pytest.mark.parametrize("shared", SHARED_WIDTHS)
def test_sizes_of_experts_have_columns_whatever_config_json_calls_them(store, number, shared):
    config = CONFIG | {"num_hidden_layers": 2, "intermediate_size": 24, "num_experts_per_tok": 1, number: 4, shared: 40}
    shapes = tensors_of(
        config
        | {"num_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 0}
        | {"shared_expert_intermediate_size": 40}
    )
    dense = {"m": DenseModel.of(checkpoint_of(config, shapes))}
    commit(store, PRUNE, **{number: 3, shared: 39})
    headers, rows = table(collect_rows(PLAN, store, dense))
    assert [row[headers.index("experts")] for row in rows] == ["4", "3"]
    assert [row[headers.index("shared expert width")] for row in rows] == ["40", "39"]


def test_a_missing_cell_is_missing_and_says_why(store):
    _, pruned = collect_rows(PLAN, store, DENSE)
    assert pruned["status"] == "missing" and pruned["cause"] == "evaluate has not run yet"
    assert pruned["kl"] is None and pruned["average"] is None and pruned["wall_time_s"] is None
    store.work(EVALUATE.id).mkdir(parents=True)
    write_failure_record(store.work(EVALUATE.id), Failure("input", "first line\nlast line", 0, 0.0))
    _, pruned = collect_rows(PLAN, store, DENSE)
    assert pruned["cause"] == "evaluate failed (input): first line"


def test_a_row_stands_without_its_speed(store):
    commit(store, EVALUATE, **SCORES)
    measured = stage_of("efficiency", "m 0.2", {}, {"model": PRUNE.as_input(), "dense": MODEL})
    cells = (PLAN.cells[0], replace(PLAN.cells[1], efficiency=measured.id))
    plan = Plan({**PLAN.stages, measured.id: measured}, cells)
    store.work(measured.id).mkdir(parents=True)
    write_failure_record(store.work(measured.id), Failure("code", "out of memory\nat last", 0, 0.0))
    _, row = collect_rows(plan, store, DENSE)
    assert (row["status"], row["cause"], row["kl"], row["decode_speed"]) == ("done", None, 0.25, None)
    assert row["speed_cause"] == "efficiency failed (code): out of memory" and row["own_time_s"] == 6.0
    shutil.rmtree(store.path(PRUNE.id))
    _, row = collect_rows(plan, store, DENSE)
    assert row["status"] == "missing" and row["cause"] == "prune has not run yet"


def test_a_row_stands_without_what_only_its_speed_needs(store):
    recover = stage_of("recover", "m 0.2", {}, {"model": PRUNE.as_input()})
    evaluate = stage_of("evaluate", "m 0.2 + lora", {}, {"model": recover.as_input()})
    measured = stage_of("efficiency", "m 0.2", {}, {"model": PRUNE.as_input(), "dense": MODEL})
    added = {stage.id: stage for stage in (recover, evaluate, measured)}
    producers = (*PLAN.cells[1].producers, recover.id)
    cell = Cell("m 0.2 + lora", "m", 0.2, "hfprune", "entropy", "lora", producers, evaluate.id, measured.id)
    commit(store, recover)
    commit(store, evaluate, **SCORES)
    shutil.rmtree(store.path(PRUNE.id))
    (row,) = collect_rows(Plan({**PLAN.stages, **added}, (cell,)), store, DENSE)
    assert (row["status"], row["cause"], row["kl"]) == ("done", None, 0.25)
    assert (row["decode_speed"], row["speed_cause"]) == (None, "prune has not run yet")


def test_a_result_stands_when_a_pass_behind_it_is_made_again(tmp_path):
    """It may be made again for a further criterion, for example; its cost is not known yet."""
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
    assert b"\r" not in (tmp_path / "results.csv").read_bytes()
    assert flat[0]["piqa/acc_norm_stderr"] == "0.1" and flat[0]["crows_pairs_english/pct_stereotype"] == "0.7"
    assert flat[1]["kl"] == "" and flat[1]["cause"] == "evaluate has not run yet"
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    lines = (tmp_path / "results.md").read_text().splitlines()
    tables = [line.count("|") for line in lines if line.startswith("|")]
    assert len(set(tables[:4])) == len(set(tables[4:])) == 1 and len(tables) == 8
    assert "- missing: m 0.2: evaluate has not run yet" in lines
    assert any(line.startswith("- reached: ") for line in lines[lines.index("## All columns") :])


def test_a_row_tells_its_own_time_from_what_it_shares(store):
    """The dense model's evaluation is not shared with any row; two ratios share a pass."""
    other = stage_of("evaluate", "m 0.3", {"limit": 3}, {"model": PRUNE.as_input()})
    commit(store, EVALUATE, record={"wall_time_s": 7.0}, **SCORES)
    cell = Cell("m 0.3", "m", 0.3, "hfprune", "entropy", "none", (IMPORTANCE.id, PRUNE.id), other.id)
    plan = Plan({**PLAN.stages, other.id: other}, (*PLAN.cells, cell))
    dense, pruned, late = collect_rows(plan, store, DENSE)
    times = ("own_time_s", "shared_time_s", "wall_time_s")
    assert [dense[it] for it in times] == [2.0, 0, 2.0]
    assert [pruned[it] for it in times] == [7.0, 4.0, 11.0]
    assert [late[it] for it in times] == [None, 4.0, None]
    assert pruned["stages"] == {IMPORTANCE.id: 2.0, PRUNE.id: 2.0, EVALUATE.id: 7.0}
    assert dense["measured_as"] == pruned["measured_as"] != late["measured_as"]


def test_weights_are_counted_without_the_adapter(tmp_path):
    store = Store(tmp_path)
    weights = {"model-1.safetensors": "12", "model-2.safetensors": "345", "adapter/adapter_model.safetensors": "6789"}
    commit(store, PRUNE, weights | {"tokenizer.json": "{}"}, ratio_reached=0.2, parameters=80, intermediate_size=38)
    dense, pruned = collect_rows(PLAN, store, {"m": DenseModel(100, 48, 400)})
    assert (dense["weight_bytes"], pruned["weight_bytes"]) == (400, 5)
    assert collect_rows(PLAN, store, DENSE)[0]["weight_bytes"] is None, "in the record of an earlier version"


def test_a_row_tells_where_it_comes_from_and_over_how_many_examples(store):
    counts = {"piqa": {"n-samples": {"piqa": {"effective": 30, "original": 1838}}}}
    counts["mmlu"] = {"n-samples": {"mmlu_a": {"effective": 10}, "mmlu_b": {"effective": 5}}}
    made = {"git_commit": "abc", "packages": {"torch": "2.6"}}
    record = {"provenance": made, "finished": 1.7e9, "config": {"seed": 3}, "device": "cpu"}
    commit(store, EVALUATE, {"results.json": json.dumps({"tasks": counts})}, record, **SCORES)
    dense, pruned = collect_rows(PLAN, store, DENSE)
    assert pruned["provenance"] == {"date": "2023-11-14T22:13:20+00:00", "seed": 3, "device": "cpu", **made}
    assert pruned["samples"] == {"piqa": 30, "mmlu_a": 10, "mmlu_b": 5, "mmlu": 15}
    assert flat_row(pruned)["piqa/samples"] == 30 and "provenance" not in flat_row(pruned)
    assert dense["samples"] == {} and dense["provenance"]["date"] is None


def test_the_table_shows_headlines_and_both_averages(store):
    headers, body = table(collect_rows(PLAN, store, DENSE))
    shown = dict(zip(headers, body[0], strict=True))
    assert (shown["piqa"], shown["crows_pairs_english"], shown["wikitext"]) == ("60.0±10.0", "70.0±1.0", "30.25")
    assert (shown["avg"], shown["avg w/o crows"], shown["KL"]) == ("65.0±5.0", "60.0±10.0", "0.250")
    assert dict(zip(headers, body[1], strict=True))["KL"] == "missing"


def test_a_row_carries_the_pass_that_really_made_it_while_todays_has_not_run(store):
    """The checkpoint was made by the pass of a sweep with more methods; a sweep with fewer plans another pass."""
    commit(store, EVALUATE, **SCORES)
    today = replace(IMPORTANCE, params=IMPORTANCE.params.scoring(["magnitude"], ["neurons"]))
    source = replace(PRUNE.inputs["importance"], location=today.id)
    cut = replace(PRUNE, inputs={**PRUNE.inputs, "importance": source})
    dense, pruned = PLAN.cells
    stages = {stage.id: stage for stage in (today, cut, DENSE_EVALUATE, EVALUATE)}
    plan = Plan(stages, (dense, replace(pruned, producers=(today.id, cut.id))))
    assert cut.id == PRUNE.id and today.id != IMPORTANCE.id
    _, row = collect_rows(plan, store, DENSE)
    assert (row["own_time_s"], row["stages"][IMPORTANCE.id], row["status"]) == (6.0, 2.0, "done")
    commit(store, today, record={"wall_time_s": 5.0})
    assert collect_rows(plan, store, DENSE)[1]["own_time_s"] == 9.0, "where it has run, rows carry it"
    for stage in (today, IMPORTANCE):
        shutil.rmtree(store.path(stage.id))
    assert collect_rows(plan, store, DENSE)[1]["own_time_s"] is None


def test_the_worst_of_the_other_texts_stands_beside_the_first(store, tmp_path):
    others = {
        "news": {"kl": 0.5, "kl_stderr": 0.125, "perplexity": 40.0},
        "law": {"kl": 1.5, "perplexity": None},
        "code": {"kl": None},
    }
    for names, header, shown in (
        (["news"], "KL news", "0.500±0.125"),
        (["news", "law"], "worst other KL", "1.500 (law)"),
        ([*others], "worst other KL", "- (code)"),
    ):
        again = Store(tmp_path / f"{len(names)}")
        commit(again, DENSE_EVALUATE, **SCORES)
        commit(again, IMPORTANCE)
        commit(again, PRUNE)
        commit(again, EVALUATE, **SCORES, other_texts={name: others[name] for name in names})
        rows = collect_rows(PLAN, again, DENSE)
        headers, body = table(rows)
        place = headers.index("ppl") + 1
        assert (headers[place], body[0][place], body[1][place]) == (header, "-", shown)
        assert flat_row(rows[1])["fidelity/news/kl"] == 0.5 and rows[1]["kl"] == 0.25


def test_a_damaged_manifest_is_a_missing_result(store):
    write_json(store.path(DENSE_EVALUATE.id) / "manifest.json", [])
    dense, _ = collect_rows(PLAN, store, DENSE)
    assert dense["status"] == "missing" and dense["perplexity"] is None


def test_an_average_is_set_against_the_dense_row_that_was_measured_alike(store):
    """Not against one with a recovery, or of another text or model."""
    half = {"tasks": {"piqa": {"acc": 0.3}}}
    commit(store, EVALUATE, **half)
    other = stage_of("evaluate", "m 0.2, few", {"limit": 3}, {"model": PRUNE.as_input()})
    commit(store, other, **half)
    cells = (*PLAN.cells, replace(PLAN.cells[1], ratio=0.3, evaluate=other.id))
    dense, pruned, few = collect_rows(Plan({**PLAN.stages, other.id: other}, cells), store, DENSE)
    assert dense["average_of_dense"] == 1.0 and pruned["average_of_dense"] == pytest.approx(0.3 / 0.65)
    assert few["average_of_dense"] is None


def test_the_cost_of_training_is_that_of_all_stages_behind_a_checkpoint(store):
    """Not of those that measure it."""
    record = {"world_size": 4, "wall_time_s": 1800.0, "device": "cpu"}
    for stage, trained in ((IMPORTANCE, {}), (PRUNE, {"training_tokens": 10, "flops_per_token": 3})):
        store.discard(stage.id)
        commit(store, stage, record=record, **trained)
    dense, pruned = collect_rows(PLAN, store, DENSE)
    assert (pruned["device_hours"], pruned["training_tokens"], pruned["training_flops"]) == (4.0, 10, 30)
    assert (dense["device_hours"], dense["training_device"], pruned["training_device"]) == (0, None, "cpu")
    store.discard(IMPORTANCE.id)
    assert collect_rows(PLAN, store, DENSE)[1]["device_hours"] is None

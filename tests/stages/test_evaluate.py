import json
import shutil

import pytest
import torch
import yaml
from damage import damage
from made_stages import stage_of
from ranks import killing, run_stage
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_text, write_documents
from worlds import Ranks, run_in_threads

from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.data.windows import load_windows
from hfprune_dist.errors import UserError
from hfprune_dist.stages import evaluate
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input

ALL_TASKS = ["tiny_choice", "tiny_rolling", "tiny_generate", "tiny_lonely"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A dense model, another model of the same shape, held-out text and tasks."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(folder / "dense", seed=0)
    save_tiny(folder / "model", seed=1)
    write_documents(folder / "held-out.jsonl", count=3)
    write_documents(folder / "news.jsonl", count=3, seed=5)
    write_tasks(folder / "tasks")
    return folder


CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "{{label}}"}
CHOICE |= {"doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
DOCUMENTS = 8


def write_tasks(folder):
    folder.mkdir()
    documents = [
        {"text": tiny_text(4 + n % 3, n), "choices": [tiny_text(1 + k, 7 * n + k) for k in range(3)], "label": n % 3}
        for n in range(DOCUMENTS)
    ]
    write_task(folder, "tiny_choice", documents, **CHOICE)
    write_task(folder, "tiny_lonely", documents[:1], **CHOICE)
    write_task(
        folder,
        "tiny_rolling",
        [{"text": tiny_text(30 + 40 * n, n)} for n in range(3)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    write_task(
        folder,
        "tiny_generate",
        [{"text": tiny_text(3 + n, n), "answer": tiny_text(1, n)} for n in range(6)],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [" "], "max_gen_toks": 8, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[{"name": "first-word", "filter": [{"function": "take_first"}]}],
    )


def write_task(folder, name, documents, **settings):
    """Write a task; the path of its data is relative to the tasks' folder."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
    task = {"task": name, **source, "metadata": {"version": 1.0}, **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def make_stage(store, inputs, tasks, *, model="model", fewshot=0, texts=("held-out",), **evaluation):
    """Return the stage as the plan has it, with the references that it needs."""
    settings = {"tasks": tasks, "dtype": "float32", "batch_size": 2, "num_fewshot": fewshot, **evaluation}
    params = EvaluationConfig.model_validate(settings).model_dump(exclude={"include_path", "fidelity"})
    hashes = FileHashes(None)
    names = {"model": inputs / model, "dense": inputs / "dense", "tasks": inputs / "tasks"}
    roles = {role: Input(hashes.of_folder(folder), str(folder)) for role, folder in names.items()}
    for text in texts:
        role = "reference" if text == texts[0] else f"reference {text}"
        roles[role] = make_reference(store, inputs, roles["dense"], params["dtype"], text).as_input()
    return stage_of("evaluate", "tiny", params, roles)


def make_reference(store, inputs, dense, dtype, name):
    """Return the stage that evaluations need, once it has run."""
    text = inputs / f"{name}.jsonl"
    settings = {"windows": 5, "sequence_length": 48, "text_field": "text"}
    params = {"dtype": dtype, "micro_batch_size": 1, "add_bos_token": True, "text": settings}
    files = {"model": dense, "text": Input(FileHashes(None).of_file(text), str(text))}
    stage = stage_of("reference", "tiny", params, files)
    if store.handle(stage.id).verify().state != "done":
        run_alone(store, stage)
    return stage


def finish(store, stage, ranks, **options):
    result = run_stage(store, stage, ranks, environment={"HF_HUB_OFFLINE": "1"}, **options)
    assert result.returncode == 0, result.output[-3000:]
    assert store.handle(stage.id).verify(thorough=True).state == "done"
    return store.handle(stage.id).manifest()["metrics"]


def run_alone(store, stage, ranks=1):
    torch.set_num_threads(1)
    run_in_threads(store, stage, Ranks(ranks))
    return store.handle(stage.id).manifest()["metrics"]


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """Everything evaluated on one rank."""
    store = Store(tmp_path_factory.mktemp("uninterrupted"))
    stage = make_stage(store, inputs, ALL_TASKS)
    return run_alone(store, stage), store.handle(stage.id).artifact


def test_results(uninterrupted):
    metrics, artifact = uninterrupted
    assert set(metrics["tasks"]) == set(ALL_TASKS)
    assert set(metrics["tasks"]["tiny_choice"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(metrics["tasks"]["tiny_generate"]) == {"exact_match[first-word]", "exact_match[first-word]_stderr"}
    assert metrics["tasks"]["tiny_rolling"]["word_perplexity"] > 1
    assert metrics["tasks"]["tiny_rolling"]["word_perplexity_stderr"] is None
    assert metrics["fidelity"]["tokens"] == 5 * 48 and metrics["fidelity"]["kl"] > 0.1
    results = read_json(artifact / "results.json")
    samples = {"effective": DOCUMENTS, "original": DOCUMENTS}
    assert results["tasks"]["tiny_choice"]["n-samples"] == {"tiny_choice": samples}
    assert results["tasks"]["tiny_choice"]["versions"] == {"tiny_choice": 1.0}
    assert metrics["fidelity"].items() <= results["fidelity"].items()
    assert (artifact / "tasks/tiny_lonely.json").is_file()


def test_three_ranks_have_the_bits_of_one(inputs, uninterrupted, tmp_path):
    store = Store(tmp_path)
    assert run_alone(store, make_stage(store, inputs, ALL_TASKS), ranks=3) == uninterrupted[0]


@pytest.mark.slow
def test_sharded_ranks_have_the_scores_of_one(inputs, uninterrupted, tmp_path):
    store, tasks = Store(tmp_path), ["tiny_choice", "tiny_lonely"]
    metrics = finish(store, make_stage(store, inputs, tasks), ranks=2, sharding="zero3")
    assert metrics["sharding"] == "zero3"
    for task in tasks:
        scores, expected = (
            {name: score or 0.0 for name, score in run["tasks"][task].items()}  # one document has no standard error
            for run in (metrics, uninterrupted[0])
        )
        assert scores == pytest.approx(expected, rel=1e-5)
    assert metrics["fidelity"] == pytest.approx(uninterrupted[0]["fidelity"], rel=1e-5)


@pytest.mark.slow
def test_a_killed_stage_goes_on_at_the_task_that_it_was_at(inputs, uninterrupted, tmp_path):
    store = Store(tmp_path)
    stage = make_stage(store, inputs, ["tiny_lonely", "tiny_choice"])
    work = store.handle(stage.id).work
    killed = run_stage(store, stage, ranks=2, environment=killing(0, 1, "/tasks/.tiny_choice"))
    assert killed.returncode != 0 and not (work / "tasks/tiny_choice.json").exists()
    finished = read_json(work / "tasks/tiny_lonely.json")
    finished["results"]["tiny_lonely"]["acc,none"] = 0.125  # seen again only if the task isn't evaluated again
    write_json(work / "tasks/tiny_lonely.json", finished)
    for file in (work / "fidelity.json", *(work / "datasets").rglob("*.arrow")):
        damage(file, 0.5, "zeros")
    metrics = run_alone(store, stage)
    assert metrics["tasks"]["tiny_lonely"]["acc"] == 0.125
    assert metrics["tasks"]["tiny_choice"] == uninterrupted[0]["tasks"]["tiny_choice"]
    assert metrics["fidelity"] == uninterrupted[0]["fidelity"]
    assert not work.exists()


def test_the_dense_model_is_its_own_reference(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "FrozenModel", lambda *args: pytest.fail("loaded"))
    metrics = run_alone(Store(tmp_path), make_stage(Store(tmp_path), inputs, [], model="dense"))
    fidelity = metrics["fidelity"]
    assert (fidelity["kl"], fidelity["top1_agreement"]) == (0.0, 1.0) and fidelity["perplexity"] > 1


def test_every_text_is_compared_as_if_alone_by_a_model_that_is_loaded_once(inputs, tmp_path, monkeypatch):
    loads, original = [], evaluate.FrozenModel
    monkeypatch.setattr(evaluate, "FrozenModel", lambda *rest: loads.append(rest) or original(*rest))
    alone = run_alone(Store(tmp_path / "alone"), make_stage(Store(tmp_path / "alone"), inputs, [], texts=["news"]))
    store = Store(tmp_path / "both")
    stage = make_stage(store, inputs, ["tiny_lonely"], texts=["held-out", "news"])
    metrics = run_alone(store, stage)
    assert metrics["other_texts"] == {"news": alone["fidelity"]} and "other_texts" not in alone
    assert metrics["fidelity"] != alone["fidelity"] and len(loads) == 2
    news = read_json(store.handle(stage.id).artifact / "results.json")["other_texts"]["news"]
    assert all(len(values) == 5 for values in news.pop("by_window").values())
    assert news == metrics["other_texts"]["news"]


def test_fidelity_is_what_full_logits_say(inputs, tmp_path):
    from transformers import AutoModelForCausalLM

    store = Store(tmp_path)
    stage = make_stage(store, inputs, [])
    metrics = run_alone(store, stage)["fidelity"]
    windows_ST = load_windows(store.handle(stage.inputs["reference"].location).artifact)
    assert windows_ST[:, 0].tolist() == [1] * 5  # BOS
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(inputs / name)(windows_ST).logits.double().log_softmax(-1)
        for name in ("dense", "model")
    )
    nll = torch.nn.functional.nll_loss(log_q[:, :-1].flatten(0, 1), windows_ST[:, 1:].flatten())
    assert metrics["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    assert metrics["top1_agreement"] == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    kl_S = (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)
    kept = read_json(store.handle(stage.id).artifact / "results.json")["fidelity"]["by_window"]
    assert kept["kl"] == pytest.approx(kl_S.tolist(), rel=1e-4) and len(kept["perplexity"]) == metrics["windows"] == 5
    assert metrics["kl_stderr"] == pytest.approx(kl_S.std().item() / 5**0.5, rel=1e-3)


def test_stock_lm_eval_gives_the_same_scores(inputs, tmp_path, monkeypatch):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = ["tiny_choice", "tiny_generate"]
    store = Store(tmp_path / "store")
    metrics = run_alone(store, make_stage(store, inputs, tasks, fewshot=2, limit=6))["tasks"]
    monkeypatch.chdir(inputs / "tasks")
    stock = simple_evaluate(
        "hf",
        model_args={"pretrained": str(inputs / "model"), "dtype": "float32", "add_bos_token": True},
        tasks=tasks,
        num_fewshot=2,
        limit=6,
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(inputs / "tasks"), include_defaults=False),
    )["results"]
    for key in ("acc", "acc_stderr", "acc_norm"):
        assert metrics["tiny_choice"][key] == pytest.approx(stock["tiny_choice"][f"{key},none"])
    assert metrics["tiny_generate"]["exact_match[first-word]"] == stock["tiny_generate"]["exact_match,first-word"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], r"^fidelity: the model's outputs are NaN or infinite; check the checkpoint's"),
        (["tiny_choice"], r"^loglikelihood\w*: the model's log-likelihoods are NaN; check the checkpoint"),
    ],
)
def test_outputs_that_are_no_numbers_are_no_result(inputs, tmp_path, monkeypatch, tasks, message):
    """Nor are the scores of tasks, which choose among NaN as if they were numbers."""
    there = shutil.copytree(inputs, tmp_path / "inputs")
    file = there / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    if tasks:
        monkeypatch.setattr(evaluate, "_fidelity", lambda *_: {"": {}})
    store = Store(tmp_path / "store")
    stage = make_stage(store, there, tasks)
    with pytest.raises(UserError, match=message):
        run_alone(store, stage)
    assert store.handle(stage.id).verify().state == "missing"

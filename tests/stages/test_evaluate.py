import math
import shutil

import pytest
import torch
from damage import damage
from evaluations import ALL_TASKS, DOCUMENTS, evaluate_stage, write_inputs
from ranks import finish, killing, metrics_of, run_stage
from safetensors.torch import load_file, save_file
from tiny import tiny_text, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from worlds import Ranks, run_in_threads

from hfprune_dist.data.windows import load_windows
from hfprune_dist.errors import UserError
from hfprune_dist.stages import evaluate
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_json, write_json


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A dense model, another one of the same shape, large enough to be sharded, held-out text and tasks."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), hidden_size=256, intermediate_size=416)


def run_alone(store, stage, ranks=1):
    torch.set_num_threads(1)
    run_in_threads(store, stage, Ranks(ranks))
    return metrics_of(store, stage)


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """Everything evaluated on one rank."""
    store = Store(tmp_path_factory.mktemp("uninterrupted"))
    stage = evaluate_stage(store, inputs, ALL_TASKS)
    return run_alone(store, stage), store.handle(stage.id).artifact


def test_results(inputs, uninterrupted):
    metrics, artifact = uninterrupted
    assert set(metrics["tasks"]) == set(ALL_TASKS)
    assert set(metrics["tasks"]["tiny_choice"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(metrics["tasks"]["tiny_generate"]) == {"exact_match[first-word]", "exact_match[first-word]_stderr"}
    model, texts = AutoModelForCausalLM.from_pretrained(inputs / "model"), [tiny_text(30 + 40 * n, n) for n in range(3)]
    ids = [torch.tensor(tiny_tokenizer()(text)["input_ids"]) for text in texts]  # one BOS in front
    nll = sum(cross_entropy(model(it[None]).logits[0, :-1], it[1:], reduction="sum").item() for it in ids)
    perplexity = math.exp(nll / sum(len(text.split()) for text in texts))
    assert metrics["tasks"]["tiny_rolling"]["word_perplexity"] == pytest.approx(perplexity, rel=1e-3)
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
    assert run_alone(store, evaluate_stage(store, inputs, ALL_TASKS), ranks=3) == uninterrupted[0]


@pytest.mark.slow
def test_sharded_ranks_have_the_scores_of_one(inputs, uninterrupted, tmp_path):
    store, tasks = Store(tmp_path), ["tiny_choice", "tiny_lonely"]
    stage = evaluate_stage(store, inputs, tasks)
    finish(store, stage, 2, environment={"HF_HUB_OFFLINE": "1"}, sharding="zero3")
    metrics = metrics_of(store, stage)
    assert metrics["sharding"] == "zero3" and store.handle(stage.id).verify(thorough=True).state == "done"
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
    stage = evaluate_stage(store, inputs, ["tiny_lonely", "tiny_choice"])
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
    metrics = run_alone(Store(tmp_path), evaluate_stage(Store(tmp_path), inputs, [], model="dense"))
    fidelity = metrics["fidelity"]
    assert (fidelity["kl"], fidelity["top1_agreement"]) == (0.0, 1.0) and fidelity["perplexity"] > 1


def test_every_text_is_compared_as_if_alone_by_a_model_that_is_loaded_once(inputs, tmp_path, monkeypatch):
    loads, original = [], evaluate.FrozenModel
    monkeypatch.setattr(evaluate, "FrozenModel", lambda *rest: loads.append(rest) or original(*rest))
    alone = run_alone(Store(tmp_path / "alone"), evaluate_stage(Store(tmp_path / "alone"), inputs, [], texts=["news"]))
    store = Store(tmp_path / "both")
    stage = evaluate_stage(store, inputs, ["tiny_lonely"], texts=["held-out", "news"])
    metrics = run_alone(store, stage)
    assert metrics["other_texts"] == {"news": alone["fidelity"]} and "other_texts" not in alone
    assert metrics["fidelity"] != alone["fidelity"] and len(loads) == 2
    news = read_json(store.handle(stage.id).artifact / "results.json")["other_texts"]["news"]
    assert all(len(values) == 5 for values in news.pop("by_window").values())
    assert news == metrics["other_texts"]["news"]


def test_fidelity_is_what_full_logits_say(inputs, tmp_path):
    store = Store(tmp_path)
    stage = evaluate_stage(store, inputs, [])
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


@pytest.mark.parametrize("template", ["", "{% for turn in messages %}{{ turn.role }}: {{ turn.content }} {% endfor %}"])
def test_stock_lm_eval_gives_the_same_scores(inputs, tmp_path, monkeypatch, template):
    """With a template, examples are turns of a conversation."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = ["tiny_choice", "tiny_generate"]
    store, there = Store(tmp_path / "store"), shutil.copytree(inputs, tmp_path / "inputs")
    (there / "model" / "chat_template.jinja").write_text(template)
    stage = evaluate_stage(store, there, tasks, fewshot=2, limit=6, apply_chat_template=bool(template))
    metrics = run_alone(store, stage)["tasks"]
    monkeypatch.chdir(there / "tasks")
    stock = simple_evaluate(
        "hf",
        model_args={"pretrained": str(there / "model"), "dtype": "float32", "add_bos_token": True},
        tasks=tasks,
        num_fewshot=2,
        limit=6,
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(there / "tasks"), include_defaults=False),
        apply_chat_template=bool(template),
        fewshot_as_multiturn=bool(template),
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
    stage = evaluate_stage(store, there, tasks)
    with pytest.raises(UserError, match=message):
        run_alone(store, stage)
    assert store.handle(stage.id).verify().state == "missing"

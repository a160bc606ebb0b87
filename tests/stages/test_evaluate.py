import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from damage import DAMAGES, damage
from faults.kill import die_in_fork
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stages import stage_of
from ranks import SoloWorld, killing, run_ranks
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_text, tiny_tokenizer, write_documents

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import EvaluationConfig, RuntimeConfig
from hfprune_dist.data.windows import load_windows
from hfprune_dist.distributed import frozen_model as inference
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.sharded_lm import AnswerLog, ShardedLM
from hfprune_dist.planning import memory
from hfprune_dist.stages import evaluate, reference
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

ALL_TASKS = ["tiny_choice", "tiny_rolling", "tiny_generate", "tiny_lonely", "tiny_group"]


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


def write_tasks(folder):
    folder.mkdir()
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "{{label}}"}
    choice |= {"doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    documents = [
        {"text": tiny_text(4 + n % 3, n), "choices": [tiny_text(1 + k, 7 * n + k) for k in range(3)], "label": n % 3}
        for n in range(30)
    ]
    write_task(folder, "tiny_choice", documents, **choice)
    write_task(folder, "tiny_lonely", documents[:1], **choice)
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
        [{"text": tiny_text(3 + n, n), "answer": tiny_text(1, n)} for n in range(7)],
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [" "], "max_gen_toks": 12, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
        filter_list=[{"name": "first-word", "filter": [{"function": "take_first"}]}],
    )
    group = {"group": "tiny_group", "task": ["tiny_choice", "tiny_lonely"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "group.yaml").write_text(yaml.safe_dump(group))


def write_task(folder, name, documents, **settings):
    """Write a task; the path of its data is relative to the tasks' folder."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}, "test_split": "test"}
    task = {"task": name, **source, "metadata": {"version": 1.0}, **settings}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_stage_file(
    store, inputs, tasks, *, model="model", sharding="replicate", fewshot=0, texts=("held-out",), **evaluation
):
    """Return the stage as the plan has it, and write its stage.json."""
    settings = {"tasks": tasks, "dtype": "float32", "batch_size": 2, "num_fewshot": fewshot, **evaluation}
    params = EvaluationConfig.model_validate(settings).model_dump(exclude={"include_path", "fidelity"})
    hashes = FileHashes(None)
    names = {"model": inputs / model, "dense": inputs / "dense", "tasks": inputs / "tasks"}
    roles = {role: Input(hashes.of_folder(folder), str(folder)) for role, folder in names.items()}
    for text in texts:
        role = "reference" if text == texts[0] else f"reference {text}"
        roles[role] = make_reference(store, inputs, roles["dense"], params["dtype"], text).as_input()
    stage = stage_of("evaluate", "tiny", params, roles)
    runtime = RuntimeConfig(sharding=sharding, collective_timeout_minutes=2).model_dump()
    record = {"stage": stage.to_json(), "runtime": runtime, "config": {}, "code": {}, "attempt": 1}
    store.work(stage.id).mkdir(parents=True, exist_ok=True)
    write_json(store.work(stage.id) / "stage.json", record)
    return stage


def make_reference(store, inputs, dense, dtype, name):
    """Return the stage that evaluations need, once it has run."""
    text = inputs / f"{name}.jsonl"
    settings = {"windows": 5, "sequence_length": 48, "text_field": "text"}
    params = {"dtype": dtype, "micro_batch_size": 1, "add_bos_token": True, "text": settings}
    files = {"model": dense, "text": Input(FileHashes(None).of_file(text), str(text))}
    stage = stage_of("reference", "tiny", params, files)
    if store.verify(stage.id).state != "done":
        reference.run(Context(stage, store, SoloWorld(), RuntimeConfig(), Progress(None), {}, {}, 1))
    return stage


def finish(store, stage, ranks):
    result = run_ranks(store, stage, ranks, environment={"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert store.verify(stage.id, thorough=True).state == "done"
    return store.manifest(stage.id)["metrics"]


def run_alone(store, stage):
    torch.set_num_threads(1)
    world = SoloWorld()
    runtime = RuntimeConfig.model_validate(read_json(store.work(stage.id) / "stage.json")["runtime"])
    progress = Progress(store.work(stage.id))
    evaluate.run(Context(stage, store, world, runtime, progress, config={}, code={}, attempt=1))
    return store.manifest(stage.id)["metrics"]


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """Everything evaluated on one rank."""
    store = Store(tmp_path_factory.mktemp("uninterrupted"))
    stage = write_stage_file(store, inputs, ALL_TASKS)
    return finish(store, stage, ranks=1), store.path(stage.id)


def close(metrics):
    return {
        task: {name: value if value is None else pytest.approx(value, rel=1e-5) for name, value in scores.items()}
        for task, scores in metrics.items()
    }


@pytest.mark.slow
def test_results(uninterrupted):
    metrics, artifact = uninterrupted
    assert set(metrics["tasks"]) == set(ALL_TASKS)
    assert set(metrics["tasks"]["tiny_choice"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert set(metrics["tasks"]["tiny_generate"]) == {"exact_match[first-word]", "exact_match[first-word]_stderr"}
    assert metrics["tasks"]["tiny_rolling"]["word_perplexity"] > 1
    assert metrics["tasks"]["tiny_rolling"]["word_perplexity_stderr"] is None
    members = [metrics["tasks"][name]["acc"] for name in ("tiny_choice", "tiny_lonely")]
    assert metrics["tasks"]["tiny_group"]["acc"] == pytest.approx((30 * members[0] + members[1]) / 31)
    assert metrics["fidelity"]["tokens"] == 5 * 48
    assert metrics["fidelity"]["kl"] > 0.1
    assert metrics["sharding"] == "replicate"
    results = read_json(artifact / "results.json")
    assert results["tasks"]["tiny_choice"]["n-samples"] == {"tiny_choice": {"effective": 30, "original": 30}}
    assert results["tasks"]["tiny_choice"]["versions"] == {"tiny_choice": 1.0}
    assert len(results["tasks"]["tiny_choice"]["config_hashes"]["tiny_choice"]) == 16
    assert metrics["fidelity"].items() <= results["fidelity"].items()
    assert (artifact / "tasks/tiny_group.json").is_file()


@pytest.mark.slow
def test_two_ranks_have_the_bits_of_one(inputs, uninterrupted, tmp_path):
    store = Store(tmp_path)
    metrics = finish(store, write_stage_file(store, inputs, ALL_TASKS), ranks=2)
    assert metrics == uninterrupted[0]


@pytest.mark.slow
def test_sharded_ranks_have_the_scores_of_one(inputs, uninterrupted, tmp_path):
    store = Store(tmp_path)
    metrics = finish(store, write_stage_file(store, inputs, ALL_TASKS, sharding="zero3"), ranks=2)
    assert metrics["sharding"] == "zero3"
    assert metrics["tasks"] == close(uninterrupted[0]["tasks"])
    assert metrics["fidelity"] == pytest.approx(uninterrupted[0]["fidelity"], rel=1e-5)


@pytest.mark.slow
def test_a_killed_stage_goes_on(inputs, uninterrupted, tmp_path):
    store = Store(tmp_path)
    tasks = ["tiny_lonely", "tiny_choice"]
    stage = write_stage_file(store, inputs, tasks)
    work = store.work(stage.id)
    killed = run_ranks(store, stage, ranks=2, environment=killing(0, 3, "tiny_choice.answers"))
    assert killed.returncode != 0
    assert (work / "tasks/tiny_choice.answers.jsonl").read_text().count("\n") >= 2
    assert not (work / "tasks/tiny_choice.json").exists()
    finished = read_json(work / "tasks/tiny_lonely.json")
    finished["results"]["tiny_lonely"]["acc,none"] = 0.125  # seen again only if the task isn't evaluated again
    write_json(work / "tasks/tiny_lonely.json", finished)
    metrics = finish(store, stage, ranks=1)
    assert metrics["tasks"]["tiny_lonely"]["acc"] == 0.125
    assert metrics["tasks"]["tiny_choice"] == uninterrupted[0]["tasks"]["tiny_choice"]
    assert metrics["fidelity"] == uninterrupted[0]["fidelity"]
    assert not work.exists()


def test_an_evaluation_killed_at_any_write_goes_on_with_the_same_bits_at_its_next_window(inputs, tmp_path, monkeypatch):
    whole = Store(tmp_path / "whole")
    stage = write_stage_file(whole, inputs, [])
    shutil.copytree(whole.root, tmp_path / "before")
    run_alone(whole, stage)
    compared, original = [], evaluate.compare_outputs
    monkeypatch.setattr(evaluate, "compare_outputs", lambda *them: compared.append(them) or original(*them))
    for kill_at in itertools.count(1):
        store = Store(shutil.copytree(tmp_path / "before", tmp_path / str(kill_at)))
        died = die_in_fork(lambda store=store: run_alone(store, stage), kill_at, store.root)
        if store.verify(stage.id).state == "missing":
            known = read_json(store.work(stage.id) / "windows.json") or {}
            measured = (store.work(stage.id) / "fidelity.json").exists()
            compared.clear()
            run_alone(store, stage)
            assert len(compared) == (0 if measured else 5 - len(known))
        assert store.manifest(stage.id)["metrics"] == whole.manifest(stage.id)["metrics"]
        results, expected = (it.path(stage.id) / "results.json" for it in (store, whole))
        assert results.read_bytes() == expected.read_bytes()
        if not died:
            break
    assert kill_at > 10


def test_no_texts_share_a_file_of_results_or_of_windows(tmp_path):
    context = SimpleNamespace(work=tmp_path)
    texts = ["", "a", "a.windows", "windows", "a.json", "windows.a", "fidelity"]
    files = [evaluate._fidelity_file(tmp_path, it) for it in texts] + [
        evaluate._windows_file(context, it) for it in texts
    ]
    assert len({file.name for file in files}) == len(files) and all(file.parent == tmp_path for file in files)


def test_an_evaluation_asked_to_stop_does_so_after_a_window(inputs, tmp_path, monkeypatch):
    store = Store(tmp_path)
    stage = write_stage_file(store, inputs, [])
    monkeypatch.setattr(Interruption, "agreed", lambda *_: True)
    with pytest.raises(Interrupted):
        run_alone(store, stage)
    assert len(read_json(store.work(stage.id) / "windows.json")) == 1


def test_answers_of_an_earlier_attempt_are_used(inputs, tmp_path, monkeypatch):
    store = Store(tmp_path)
    stage = write_stage_file(store, inputs, ["tiny_choice"])
    answered, original = [], ShardedLM._answer

    def dies_at_the_fourth_chunk(self, method, number, arguments):
        if len(answered) == 3:
            raise MemoryError("no more")
        answered.append(number)
        return original(self, method, number, arguments)

    monkeypatch.setattr(ShardedLM, "_answer", dies_at_the_fourth_chunk)
    with pytest.raises(MemoryError, match="no more"):
        run_alone(store, stage)
    monkeypatch.setattr(ShardedLM, "_answer", lambda self, *chunk: answered.append(chunk[1]) or original(self, *chunk))
    run_alone(store, stage)
    assert answered == sorted(set(answered))


def test_an_answer_cut_short_by_a_kill_is_asked_again(tmp_path):
    chunks = [("generate_until", number, [(f"text {number}", {"until": ["\n"]})]) for number in range(2)]
    log = AnswerLog(tmp_path / "answers.jsonl")
    log.add(chunks, [["one"], ["two"]])
    content = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(content[:-3])
    log = AnswerLog(tmp_path / "answers.jsonl")
    assert [log.get(chunk) for chunk in chunks] == [["one"], None]
    log.add(chunks[1:], [["two"]])
    assert [AnswerLog(tmp_path / "answers.jsonl").get(chunk) for chunk in chunks] == [["one"], ["two"]]


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 40), size=st.integers(1, 9))
def test_all_ranks_measure_fidelity_on_equally_many_windows_and_leave_none_out(count, size):
    shares = [evaluate._my_windows(range(count), SoloWorld(rank, size)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert {index for share in shares for index in share} == set(range(count))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(how=DAMAGES)
def test_a_damaged_log_has_no_answers_but_those_that_were_written(tmp_path_factory, how):
    file = tmp_path_factory.mktemp("log") / "answers.jsonl"
    chunks = [("loglikelihood", number, [(f"text {number}", "a")]) for number in range(4)]
    answers = [[[-1.5 * number, True], [float(number), False]] for number in range(4)]
    AnswerLog(file).add(chunks, answers)
    damage(file, *how)
    log = AnswerLog(file)
    assert all(log.get(chunk) in (None, mine) for chunk, mine in zip(chunks, answers, strict=True))
    log.add(chunks, answers)
    assert [AnswerLog(file).get(chunk) for chunk in chunks] == answers


@pytest.mark.parametrize("line", [b"5", b"[]", b"{}", b'"text"', b"\xff\xfe", bytes(30), b'["0", [1.0]]', b"null"])
def test_lines_of_a_log_that_are_none_are_passed_over(tmp_path, line):
    file = tmp_path / "answers.jsonl"
    chunk = ("loglikelihood", 0, [("text", "a")])
    file.write_bytes(line)
    AnswerLog(file).add([chunk], [[[0.5, True]]])
    assert AnswerLog(file).get(chunk) == [[0.5, True]]


def test_a_changed_digit_in_a_log_is_noticed(tmp_path):
    file = tmp_path / "answers.jsonl"
    chunk = ("loglikelihood", 0, [("text", "a")])
    AnswerLog(file).add([chunk], [[[-12.25, True]]])
    file.write_bytes(file.read_bytes().replace(b"-12.25", b"-92.25"))
    assert AnswerLog(file).get(chunk) is None


@pytest.mark.parametrize("how", [(0.0, "zeros"), (0.6, "nothing")])
def test_whatever_a_dead_attempt_left_damaged_the_next_has_the_same_results(inputs, tmp_path, monkeypatch, capsys, how):
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "damaged")
    tasks = ["tiny_lonely", "tiny_choice"]
    run_alone(whole, write_stage_file(whole, inputs, tasks))
    stage = write_stage_file(store, inputs, tasks)
    asked, original = [], ShardedLM._answer

    def dies_at_the_fourth_chunk(self, *chunk):
        asked.append(chunk[1])
        if len(asked) == 4:
            raise MemoryError("no more")
        return original(self, *chunk)

    monkeypatch.setattr(ShardedLM, "_answer", dies_at_the_fourth_chunk)
    with pytest.raises(MemoryError, match="no more"):
        run_alone(store, stage)
    monkeypatch.undo()
    left = [file for file in store.work(stage.id).rglob("*") if file.is_file() and file.name != "stage.json"]
    assert {"fidelity.json", "tiny_lonely.json", "tiny_choice.answers.jsonl"} <= {file.name for file in left}
    assert any(file.suffix == ".arrow" for file in left)
    for file in left:
        damage(file, *how)
    run_alone(store, stage)
    results = [read_json(it.path(stage.id) / "results.json") for it in (whole, store)]
    assert results[0] == results[1]
    assert capsys.readouterr().out.count("set aside as") == 3


def test_the_dense_model_is_its_own_reference(inputs, tmp_path, monkeypatch):
    store = Store(tmp_path)
    monkeypatch.setattr(evaluate, "FrozenModel", lambda *args: pytest.fail("loaded"))
    metrics = run_alone(store, write_stage_file(store, inputs, [], model="dense"))
    assert metrics["fidelity"]["kl"] == 0.0
    assert metrics["fidelity"]["top1_agreement"] == 1.0
    assert metrics["fidelity"]["perplexity"] > 1
    assert metrics["tasks"] == {}


def test_every_text_is_compared_as_if_alone_and_a_finished_one_not_again(inputs, tmp_path):
    alone = run_alone(
        Store(tmp_path / "alone"), write_stage_file(Store(tmp_path / "alone"), inputs, [], texts=["news"])
    )
    store = Store(tmp_path / "both")
    stage = write_stage_file(store, inputs, [], texts=["held-out", "news"])
    finished = {"kl": 0.125}
    write_json(store.work(stage.id) / "fidelity.json", finished)
    metrics = run_alone(store, stage)
    assert (metrics["fidelity"], metrics["other_texts"]) == (finished, {"news": alone["fidelity"]})
    news = read_json(store.path(stage.id) / "results.json")["other_texts"]["news"]
    assert all(len(values) == 5 for values in news.pop("by_window").values())
    assert news == metrics["other_texts"]["news"]
    assert "other_texts" not in alone


def test_fidelity_is_what_full_logits_say(inputs, tmp_path):
    from transformers import AutoModelForCausalLM

    store = Store(tmp_path)
    stage = write_stage_file(store, inputs, [])
    metrics = run_alone(store, stage)["fidelity"]
    windows_ST = load_windows(store.path(stage.inputs["reference"].location))
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
    kept = read_json(store.path(stage.id) / "results.json")["fidelity"]["by_window"]
    assert kept["kl"] == pytest.approx(kl_S.tolist(), rel=1e-4) and len(kept["perplexity"]) == metrics["windows"] == 5
    assert metrics["kl_stderr"] == pytest.approx(kl_S.std().item() / 5**0.5, rel=1e-3)


def test_stock_lm_eval_gives_the_same_scores(inputs, tmp_path, monkeypatch):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = ["tiny_choice", "tiny_generate"]
    store = Store(tmp_path / "store")
    metrics = run_alone(store, write_stage_file(store, inputs, tasks, fewshot=2, limit=6))["tasks"]
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


def prompts(inputs, folder, monkeypatch, **settings):
    """Return the token ids of every sequence that the model scores for two documents."""
    seen = []
    original = ShardedLM._model_call

    def record(self, ids_BT, *args, **kwargs):
        seen.extend(ids_BT.tolist())
        return original(self, ids_BT, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ShardedLM, "_model_call", record)
        run_alone(
            Store(folder), write_stage_file(Store(folder), inputs, ["tiny_choice"], limit=2, batch_size=1, **settings)
        )
    return seen


def test_settings_reach_the_prompts(inputs, tmp_path, monkeypatch):
    plain = prompts(inputs, tmp_path / "plain", monkeypatch)
    assert all(ids[0] == 1 and ids[1] != 1 for ids in plain)  # one BOS
    assert prompts(inputs, tmp_path / "bos", monkeypatch, add_bos_token=False) == [ids[1:] for ids in plain]
    shots = prompts(inputs, tmp_path / "shots", monkeypatch, fewshot=2)
    assert min(map(len, shots)) > max(map(len, plain))
    chat = prompts(with_chat_template(inputs, tmp_path), tmp_path / "chat", monkeypatch, apply_chat_template=True)
    opened = tiny_tokenizer()("USER:", add_special_tokens=False)["input_ids"]
    assert all(ids[1 : 1 + len(opened)] == opened for ids in chat)


def with_chat_template(inputs, folder):
    chat = folder / "inputs"
    shutil.copytree(inputs, chat)
    template = "{% for m in messages %}{{ m['role'] | upper }}:{{ m['content'] }};{% endfor %}ASSISTANT:"
    (chat / "model/chat_template.jinja").write_text(template)
    return chat


def test_rolling_windows_begin_with_one_bos(inputs, tmp_path, monkeypatch):
    seen = []
    original = ShardedLM._loglikelihood_tokens
    monkeypatch.setattr(
        ShardedLM,
        "_loglikelihood_tokens",
        lambda self, requests, **k: seen.extend(requests) or original(self, requests),
    )
    run_alone(Store(tmp_path), write_stage_file(Store(tmp_path), inputs, ["tiny_rolling"]))
    firsts = [(context, continuation) for _, context, continuation in seen if context == [1]]
    assert len(firsts) == 3  # documents
    assert all(1 not in continuation for _, continuation in firsts)


def test_a_bfloat16_model_is_scored_in_float32(inputs, tmp_path, monkeypatch):
    answers = {}
    original = ShardedLM.loglikelihood_rolling
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(
            ShardedLM,
            "loglikelihood_rolling",
            lambda *a, to=dtype, **k: answers.setdefault(to, original(*a, **k)),
        )
        run_alone(
            Store(tmp_path / dtype), write_stage_file(Store(tmp_path / dtype), inputs, ["tiny_rolling"], dtype=dtype)
        )
    assert answers["bfloat16"] == pytest.approx(answers["float32"], rel=0.01)
    assert all(torch.tensor(answer).bfloat16().item() != answer for answer in answers["bfloat16"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "tiny_broken.*can't be loaded.*nowhere.jsonl"),
        ({"test_split": "exam"}, "tiny_broken.*can't be loaded.*exam"),
        ({"doc_to_choice": "{{nothing}}"}, "tiny_broken.*can't be"),
        ({"metric_list": [{"metric": "no_such_metric"}]}, "tiny_broken.*can't be loaded"),
        ({"doc_to_choice": ["b", "long " * 200]}, "tiny_broken.*can't be evaluated.*loglikelihood.*512 tokens"),
    ],
)
def test_a_broken_task_is_named(inputs, tmp_path, change, message):
    broken = tmp_path / "inputs"
    broken.mkdir()
    for name in ("dense", "model", "held-out.jsonl"):
        (broken / name).symlink_to(inputs / name)
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "{{label}}"}
    document = {"text": "a", "label": 0, "choices": ["b", "c"]}
    (broken / "tasks").mkdir()
    write_task(broken / "tasks", "tiny_broken", [document], **{**choice, "doc_to_choice": "{{choices}}", **change})
    store = Store(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        run_alone(store, write_stage_file(store, broken, ["tiny_broken"]))


def test_a_name_with_slashes_is_a_file_not_a_folder(inputs, tmp_path):
    own = tmp_path / "inputs"
    own.mkdir()
    for name in ("dense", "model", "held-out.jsonl"):
        (own / name).symlink_to(inputs / name)
    shutil.copytree(inputs / "tasks", own / "tasks")
    file = own / "tasks/tiny_lonely.yaml"
    file.write_text(file.read_text().replace("task: tiny_lonely", "task: tiny/lonely"))
    store = Store(tmp_path / "store")
    stage = write_stage_file(store, own, ["tiny/lonely"])
    assert set(run_alone(store, stage)["tasks"]) == {"tiny/lonely"}
    assert [it.name for it in (store.path(stage.id) / "tasks").iterdir()] == ["tiny%2Flonely.json"]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text("a/%25F", min_size=1, max_size=6), min_size=2, max_size=6, unique=True))
def test_no_two_tasks_share_a_file(names):
    files = {evaluate._task_file(Path("work"), name) for name in names}
    assert len(files) == len(names)
    assert {file.parent for file in files} == {Path("work/tasks")}


@pytest.mark.parametrize(
    ("requested", "free", "expected"),
    [
        ("auto", [1e9, 1e9], "replicate"),
        ("auto", [1e9, 1e3], "zero3"),  # it must fit everywhere
        ("auto", [1e3], "replicate"),  # there is nobody to share it with
        ("zero3", [1e9], "zero3"),
        ("replicate", [1e3, 1e3], "replicate"),
    ],
)
def test_models_are_sharded_where_they_do_not_fit(inputs, monkeypatch, requested, free, expected):
    class Several(World):
        def all_gather(self, value):
            return free

    monkeypatch.setattr(memory, "LIVE_PARAMETERS", 0)  # so that sharding takes less memory also of a tiny model
    monkeypatch.setattr(inference, "free_bytes", lambda world: free[0])
    checkpoint = open_checkpoint(inputs / "model")
    world = Several(rank=0, size=len(free), local_size=1, device=torch.device("cpu"))
    job = memory.Evaluate(0, 0, window=1)
    assert inference.choose_sharding(requested, job, checkpoint, world) == expected


def damaged(inputs, folder, name, place=(0, 0), number=float("nan")):
    """Return the folder of a copy of the inputs, in which one number of the model's weights is NaN or another."""
    shutil.copytree(inputs, folder)
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors[name][place] = number
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_outputs_that_are_no_numbers_are_no_result(inputs, tmp_path):
    """Nor are the scores of tasks, which choose among NaN as if they were numbers."""
    there = damaged(inputs, tmp_path / "inputs", "model.layers.1.mlp.down_proj.weight")
    store = Store(tmp_path / "store")
    stage = write_stage_file(store, there, [])
    with pytest.raises(UserError, match=r"^fidelity: the model's outputs are NaN or infinite; check the checkpoint's"):
        run_alone(store, stage)
    assert store.verify(stage.id).state == "missing"


@pytest.mark.parametrize("name", ["kl", "nll"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_divergence_that_is_not_finite_is_no_result(inputs, tmp_path, monkeypatch, name, value):
    compare = evaluate.compare_outputs
    monkeypatch.setattr(evaluate, "compare_outputs", lambda *them: replace(compare(*them), **{name: value}))
    store = Store(tmp_path / "store")
    with pytest.raises(UserError, match=r"^fidelity: the model's outputs are NaN or infinite; check the checkpoint's"):
        run_alone(store, write_stage_file(store, inputs, []))


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_rolling"])
def test_log_likelihoods_that_are_no_numbers_are_no_score(inputs, tmp_path, monkeypatch, task):
    there = damaged(inputs, tmp_path / "inputs", "model.layers.1.mlp.down_proj.weight")
    monkeypatch.setattr(evaluate, "_measure_fidelity", lambda *_: None)
    store = Store(tmp_path / "store")
    stage = write_stage_file(store, there, [task])
    with pytest.raises(
        UserError, match=r"^loglikelihood\w*: the model's log-likelihoods are NaN; check the checkpoint"
    ):
        run_alone(store, stage)
    assert store.verify(stage.id).state == "missing"

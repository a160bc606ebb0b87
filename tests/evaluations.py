"""Evaluations of a tiny model: texts, tasks and the stages that compare it with its dense model."""

import json

import yaml
from made_stages import stage_of
from ranks import run_here
from tiny import save_tiny, tiny_text, write_documents

from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input

TEXT = {"windows": 5, "sequence_length": 48, "text_field": "text"}
ALL_TASKS = ["tiny_choice", "tiny_rolling", "tiny_generate", "tiny_lonely"]


def write_inputs(folder, **sizes):
    """Write a dense model, another model of the same shape, held-out texts and tasks."""
    save_tiny(folder / "dense", seed=0, **sizes)
    save_tiny(folder / "model", seed=1, **sizes)
    write_documents(folder / "held-out.jsonl", count=5)
    write_documents(folder / "news.jsonl", count=5, seed=5)
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


def evaluate_stage(store, inputs, tasks, *, model="model", fewshot=0, texts=("held-out",), world=None, **evaluation):
    """Return the stage as the plan has it, with the references that it needs."""
    settings = {"tasks": tasks, "dtype": "float32", "batch_size": 2, "num_fewshot": fewshot, **evaluation}
    params = EvaluationConfig.model_validate(settings).model_dump(exclude={"include_path", "fidelity"})
    hashes = FileHashes(None)
    names = {"model": inputs / model, "dense": inputs / "dense", "tasks": inputs / "tasks"}
    roles = {role: Input(hashes.of_folder(folder), str(folder)) for role, folder in names.items()}
    for text in texts:
        role = "reference" if text == texts[0] else f"reference {text}"
        stage = reference_stage(inputs, roles["dense"], params["dtype"], text)
        if store.handle(stage.id).verify().state != "done":
            run_here(store, stage, world)
        roles[role] = stage.as_input()
    return stage_of("evaluate", "tiny", params, roles)


def reference_stage(inputs, dense, dtype, name):
    """Return the stage that evaluations on a text need."""
    text = inputs / f"{name}.jsonl"
    params = {"dtype": dtype, "add_bos_token": True, "text": TEXT}
    files = {"model": dense, "text": Input(FileHashes(None).of_file(text), str(text))}
    return stage_of("reference", "tiny", params, files)

"""Evaluate: fidelity to the dense model's reference, and lm-eval tasks, on a model that is loaded once.

The fidelity to all texts, and the result of each task, are kept in the work folder: a killed stage resumes after them.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.texts import FIRST, OTHER_TEXTS, compared_texts, reference_role
from hfprune_dist.core.devices import send
from hfprune_dist.core.fidelity import FidelitySums, compare_outputs, standard_errors
from hfprune_dist.core.head import Outputs, next_ids
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.data.windows import load_windows
from hfprune_dist.distributed.frozen_model import FrozenModel, choose_sharding
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, explain, plain, scores_of
from hfprune_dist.kinds.evaluate import EvaluateParameters
from hfprune_dist.models.single_layer import Head, LayerReader
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, read_object, write_json
from hfprune_dist.training.teacher_states import DenseStates

Context = AnyContext[EvaluateParameters]

RESULTS = "results.json"
FIDELITY = "fidelity.json"
TASKS = "tasks"
DATASETS = "datasets"
# Key of the results for each window of a text; a manifest has only those over all windows.
BY_WINDOW = "by_window"
# What results.json has of lm-eval's result for a task.
DETAILS = ("results", "groups", "group_subtasks", "n-samples", "n-shot", "versions", "higher_is_better")
# Resamples for standard errors that have no closed form (e.g. of f1); lm-eval's 100,000 take minutes.
BOOTSTRAP_ITERATIONS = 1000


def run(context: Context) -> None:
    """Write ``results.json`` and lm-eval's own results, ``tasks/<task>.json``."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    params, world = context.params, context.world
    checkpoint = open_checkpoint(context.input_path("model"))
    window_tokens = load_windows(context.input_path(reference_role(FIRST))).shape[1]
    sharding = choose_sharding(context.runtime.sharding, params.forwards(checkpoint, window_tokens), world)
    fidelity = context.work / FIDELITY
    tasks = {task: _task_file(context.work, task) for task in params.tasks}

    @cache
    def load() -> FrozenModel:
        return FrozenModel(checkpoint, getattr(torch, params.dtype), sharding, world)

    if world.on_rank0(lambda: read_object(fidelity) is None):
        result = plain(_fidelity(context, load))
        world.on_rank0(lambda: write_json(fidelity, result))
    if missing := world.on_rank0(lambda: [task for task, file in tasks.items() if read_object(file) is None]):
        _evaluate_tasks(context, load(), missing)
    draft = context.open_draft()

    def write() -> dict[str, Any]:
        texts, results = read_json(fidelity), {task: read_json(file) for task, file in tasks.items()}
        (draft / TASKS).mkdir()
        for task, result in results.items():
            write_json(_task_file(draft, task), result)
        details = {task: {key: found[key] for key in DETAILS if key in found} for task, found in results.items()}
        write_json(draft / RESULTS, {**_by_place(texts), "tasks": details, "limit": params.limit})
        summaries = {text: {key: found[key] for key in found if key != BY_WINDOW} for text, found in texts.items()}
        scores = {name: score for task in results for name, score in scores_of(task, results[task]).items()}
        return {**_by_place(summaries), "tasks": scores}

    context.commit(draft, {**world.on_rank0(write), "sharding": sharding})


def _by_place(texts: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange results by text: the first text's under one key, those of any others under another."""
    others = {text: found for text, found in texts.items() if text != FIRST}
    return {"fidelity": texts[FIRST], **({OTHER_TEXTS: others} if others else {})}


# Fidelity.


def _fidelity(context: Context, load: Callable[[], FrozenModel]) -> dict[str, Any]:
    """Fidelity on each text with its standard errors, and the fidelity of each window; collective.

    Only the head of the dense model is read. It is its own reference, so it isn't loaded to be measured itself.
    Each window is compared on one rank. Forwards of sharded models are collective, so ranks with fewer windows repeat
    the last. Sums are added in the order of the windows, so that the number of ranks changes no bit.
    """
    world, inputs = context.world, context.stage.inputs
    dtype = getattr(torch, context.params.dtype)
    head = LayerReader(open_checkpoint(context.input_path("dense")), dtype, world.device).head()
    model = None if inputs["model"].identity == inputs["dense"].identity else load()
    texts = {text: DenseStates(context.input_path(role)) for text, role in compared_texts(inputs).items()}
    windows = [(text, index) for text, states in texts.items() for index in range(len(states.windows_ST))]
    sums: list[FidelitySums] = []
    for first in range(0, len(windows), world.size):
        context.progress.update("fidelity", first, len(windows))
        text, index = windows[min(first + world.rank, len(windows) - 1)]
        sums += world.all_gather(_compared(index, texts[text], head, model))
        context.interruption.stop_if_agreed(world)
    context.progress.update("fidelity", len(windows), len(windows))
    found: dict[str, Any] = {}
    for text in texts:
        of_text = [one for (its_text, _), one in zip(windows, sums, strict=False) if its_text == text]
        if not all(math.isfinite(one.kl + one.nll) for one in of_text):
            where = f"fidelity {text}".rstrip()
            raise UserError(f"{where}: the model's outputs are NaN or infinite; check the checkpoint's weights")
        alone = [one.means() for one in of_text]
        by_window = {name: [means[name] for means in alone] for name in ("perplexity", "kl", "top1_agreement")}
        means = sum(of_text, FidelitySums()).means()
        found[text] = {**means, **standard_errors(of_text), "windows": len(of_text), BY_WINDOW: by_window}
    return found


def _compared(index: int, states: DenseStates, head: Head, model: FrozenModel | None) -> FidelitySums:
    window_T, device = states.windows_ST[index], head.weight_VC.device
    dense = Outputs(send(states.hidden(index), device), head.weight_VC, head.bias_V, head.after)
    targets = send(next_ids(window_T), device)
    if model is None:
        return compare_outputs(dense, dense, targets)
    hidden_TC = model.final_hidden(window_T)
    with model.head() as (weight_VC, bias_V):
        return compare_outputs(dense, Outputs(hidden_TC, weight_VC, bias_V, head.after), targets)


# Tasks.


def _evaluate_tasks(context: Context, model: FrozenModel, tasks: list[str]) -> None:
    """Evaluate task by task: rank 0 runs lm-eval, and all ranks answer its requests."""
    import datasets
    import lm_eval.api.task

    from hfprune_dist.evaluation.sharded_lm import ShardedLM

    # Progress has its own file, errors have their own messages.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    lm_eval.api.task.tqdm = lambda documents, **_: documents  # a bar without a switch
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap would fork a process with threads and a process group
    params = context.params
    tokenizer = load_tokenizer(context.input_path("model"))
    lm = ShardedLM(model, tokenizer, context.interruption, params.batch_size, params.add_bos_token)

    def evaluate_each() -> None:
        # The datasets library flushes nothing, yet trusts the files that it finds, so those of a dead attempt go.
        built = context.work / DATASETS
        shutil.rmtree(built, ignore_errors=True)
        loader = TaskLoader(tasks, context.input_if_any("tasks"), built)
        (context.work / TASKS).mkdir(exist_ok=True)
        for task in tasks:
            context.progress.update(task, 0, 1)
            write_json(_task_file(context.work, task), _run_task(context, lm, loader, task))

    lm.run(evaluate_each)


def _run_task(context: Context, lm: Any, loader: TaskLoader, task: str) -> dict[str, Any]:
    """lm-eval's result for one task or group, as a JSON value.

    Raises:
        UserError: naming the task, if its YAML file, its data or its functions fail.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    from hfprune_dist.evaluation.sharded_lm import ModelError

    params = context.params
    # lm-eval's own seeds, anew for each task, so that a resumed stage sees the same examples.
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = loader.load(task, params.num_fewshot)
    lm.task, lm.report = task, lambda done, total: context.progress.update(task, done, total)
    try:
        result = evaluate(
            lm,
            loaded,
            limit=params.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
            apply_chat_template=params.apply_chat_template,
            fewshot_as_multiturn=params.apply_chat_template,
        )
    except ModelError as failure:
        assert failure.__cause__ is not None
        raise failure.__cause__ from None
    except Exception as error:  # a task is other people's code and data: anything can happen
        raise UserError(f"task {task!r} can't be evaluated: {explain(error)}") from error
    cleaned: dict[str, Any] = plain(result)
    return cleaned


def _task_file(folder: Path, task: str) -> Path:
    return folder / TASKS / (task.replace("%", "%25").replace("/", "%2F") + ".json")

"""Evaluate: fidelity to the dense model's reference, and lm-eval tasks, on a model that is loaded once.

The result of each text and of each task is kept in the work folder: a killed stage resumes at the next.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.texts import FIRST, OTHER_TEXTS, compared_texts
from hfprune_dist.core.fidelity import FidelitySums, Outputs, compare_outputs, standard_errors
from hfprune_dist.core.head import next_ids
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.distributed.frozen_model import DecidedSharding, FrozenModel, choose_sharding
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, details_of, explain, plain, scores_of
from hfprune_dist.kinds.evaluate import REQUEST_TOKENS, EvaluateParameters
from hfprune_dist.models.single_layer import Head, LayerReader
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_object, write_json
from hfprune_dist.training.teacher_states import DenseStates

Context = AnyContext[EvaluateParameters]

RESULTS = "results.json"
TASKS = "tasks"
DATASETS = "datasets"
# Key of the results for each window in a text's file; a manifest has only those over all windows.
BY_WINDOW = "by_window"
# Resamples for standard errors that have no closed form (e.g. of f1); lm-eval's 100,000 take minutes.
BOOTSTRAP_ITERATIONS = 1000


def run(context: Context) -> None:
    """Write ``results.json`` and lm-eval's own results, ``tasks/<task>.json``."""
    _be_quiet()
    checkpoint, world = open_checkpoint(context.input_path("model")), context.world
    sharding = choose_sharding(context.runtime.sharding, context.params.forwards(checkpoint, REQUEST_TOKENS), world)
    texts, tasks = world.on_rank0(lambda: _left_to_do(context))
    model = _measure_fidelity(context, sharding, texts) if texts else None
    if tasks:
        _evaluate_tasks(context, model or _load(context, sharding), tasks)
    draft = context.open_draft()
    metrics = world.on_rank0(lambda: _write_results(context, draft))
    context.commit(draft, {**metrics, "sharding": sharding})


def _left_to_do(context: Context) -> tuple[list[str], list[str]]:
    """Texts and tasks for which earlier attempts left no result."""
    texts = [text for text in _texts(context) if read_object(_fidelity_file(context.work, text)) is None]
    tasks = [task for task in context.params.tasks if read_object(_task_file(context.work, task)) is None]
    return texts, list(dict.fromkeys(tasks))


def _dtype(context: Context) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, context.params.dtype)
    return dtype


def _load(context: Context, sharding: DecidedSharding) -> FrozenModel:
    checkpoint = open_checkpoint(context.input_path("model"))
    return FrozenModel(checkpoint, _dtype(context), context.params.batch_size, sharding, context.world)


def _write_results(context: Context, draft: Path) -> dict[str, Any]:
    """Write the artifact, from the results in the work folder; return what the manifest has of them."""
    results = {task: _read(_task_file(context.work, task)) for task in context.params.tasks}
    fidelity = {text: _read(_fidelity_file(context.work, text)) for text in _texts(context)}
    (draft / TASKS).mkdir()
    for task, result in results.items():
        write_json(_task_file(draft, task), result)
    details = {task: details_of(result) for task, result in results.items()}
    write_json(draft / RESULTS, {**_by_place(fidelity), "tasks": details, "limit": context.params.limit})
    summaries = {
        text: {name: value for name, value in found.items() if name != BY_WINDOW} for text, found in fidelity.items()
    }
    scores = {name: score for task in results for name, score in scores_of(task, results[task]).items()}
    return {**_by_place(summaries), "tasks": scores}


def _read(file: Path) -> dict[str, Any]:
    result = read_object(file)
    assert result is not None, f"{file} was there a moment ago"
    return result


# Fidelity.


def _by_place(texts: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange results by text: the first text's under one key, those of any others under another."""
    others = {text: found for text, found in texts.items() if text != FIRST}
    return {"fidelity": texts[FIRST], **({OTHER_TEXTS: others} if others else {})}


def _texts(context: Context) -> dict[str, str]:
    """Name of each text -> role of the dense model's reference on it."""
    return compared_texts(context.stage.inputs)


def _measure_fidelity(context: Context, sharding: DecidedSharding, texts: Sequence[str]) -> FrozenModel | None:
    """Compare the model with its dense original on some texts and keep the results; return the model, still loaded.

    Only the head of the dense model is read. It is its own reference, so it isn't loaded to be measured itself.
    """
    world = context.world
    head = LayerReader(open_checkpoint(context.input_path("dense")), _dtype(context), world.device).head()
    is_dense = context.stage.inputs["model"].identity == context.stage.inputs["dense"].identity
    model = None if is_dense else _load(context, sharding)
    for text in texts:
        result = plain(_fidelity(context, text, head, model))
        world.on_rank0(partial(write_json, _fidelity_file(context.work, text), result))
    return model


def _fidelity(context: Context, text: str, head: Head, model: FrozenModel | None) -> dict[str, Any]:
    """A text's fidelity with its standard errors, and the fidelity of each of its windows; collective.

    Each window is compared on one rank. Forwards of sharded models are collective, so ranks with fewer windows repeat
    the last. Sums are added in the order of the windows, so that the number of ranks changes no bit.
    """
    world, phase = context.world, _phase(text)
    states = DenseStates(context.input_path(_texts(context)[text]))
    count, sums = len(states.windows_ST), dict[int, FidelitySums]()
    for first in range(0, count, world.size):
        context.progress.update(phase, first, count)
        index = min(first + world.rank, count - 1)
        sums |= dict(world.all_gather((index, _compared(index, states, head, model))))
        context.interruption.stop_if_agreed(world)
    context.progress.update(phase, count, count)
    windows = [sums[index] for index in range(count)]
    if not all(math.isfinite(window.kl + window.nll) for window in windows):
        raise UserError(f"{phase}: the model's outputs are NaN or infinite; check the checkpoint's weights")
    alone = [window.means() for window in windows]
    by_window = {name: [means[name] for means in alone] for name in ("perplexity", "kl", "top1_agreement")}
    means = sum(windows, FidelitySums()).means()
    return {**means, **standard_errors(windows), "windows": count, BY_WINDOW: by_window}


def _compared(index: int, states: DenseStates, head: Head, model: FrozenModel | None) -> FidelitySums:
    window_T, device = states.windows_ST[index], head.weight_VC.device
    with nullcontext() if model is None else _outputs(model, window_T, head) as outputs:
        dense = Outputs(states.hidden(index).to(device), head.weight_VC, head.bias_V, head.after)
        return compare_outputs(dense, dense if outputs is None else outputs, next_ids(window_T).to(device))


@contextmanager
def _outputs(model: FrozenModel, window_T: Tensor, head: Head) -> Iterator[Outputs]:
    hidden_TC = model.final_hidden(window_T)
    with model.head() as (weight_VC, bias_V):
        yield Outputs(hidden_TC, weight_VC, bias_V, head.after)


def _phase(text: str) -> str:
    return f"fidelity {text}".rstrip()


def _fidelity_file(folder: Path, text: str) -> Path:
    return folder / f"{_phase(text)}.json"


# Tasks.


def _evaluate_tasks(context: Context, model: FrozenModel, tasks: list[str]) -> None:
    """Evaluate task by task: rank 0 runs lm-eval, and all ranks answer its requests."""
    from hfprune_dist.evaluation.sharded_lm import ShardedLM

    params = context.params
    tokenizer = load_tokenizer(context.input_path("model"))
    lm = ShardedLM(model, tokenizer, context.interruption, params.batch_size, params.add_bos_token)

    def evaluate_each() -> None:
        # The datasets library flushes nothing, yet trusts the files that it finds, so those of a dead attempt go.
        cache = context.work / DATASETS
        shutil.rmtree(cache, ignore_errors=True)
        loader = TaskLoader(tasks, context.own_file("tasks"), cache)
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
    from lm_eval.evaluator import evaluate

    from hfprune_dist.evaluation.sharded_lm import ModelError

    params = context.params
    _seed_all()
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


def _seed_all() -> None:
    """Set lm-eval's own seeds anew for each task, so that a resumed stage sees the same examples."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _be_quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap would fork a process with threads and a process group

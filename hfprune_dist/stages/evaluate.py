"""Evaluate: fidelity to the dense model's reference, and lm-eval tasks, on a model that is loaded once.

What is finished is kept in the work folder: a killed stage goes on at the next chunk of requests of its current task.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.parameters import EvaluateParameters
from hfprune_dist.core.fidelity import FidelitySums, Outputs, compare_outputs, next_ids
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.distributed.frozen_model import FrozenModel, Sharding, choose_sharding
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, details_of, explain, plain, scores_of
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, set_aside, write_json
from hfprune_dist.training.teacher_states import DenseStates

Context = AnyContext[EvaluateParameters]

FIDELITY = "fidelity.json"
RESULTS = "results.json"
TASKS = "tasks"
DATASETS = "datasets"
# Resamples for standard errors that have no closed form (e.g. of f1); lm-eval's 100,000 take minutes.
BOOTSTRAP_ITERATIONS = 1000


def run(context: Context) -> None:
    """Write ``results.json`` and lm-eval's own results, ``tasks/<task>.json``."""
    _be_quiet()
    sharding = choose_sharding(
        context.runtime.sharding, open_checkpoint(context.input_path("model")), _dtype(context), context.world
    )
    fidelity_done, tasks = context.world.broadcast(_progress(context) if context.world.is_first else (False, []))
    model = None
    if not fidelity_done:
        model = _measure_fidelity(context, sharding)
    if tasks:
        _evaluate_tasks(context, model or _load(context, "model", sharding), tasks)
    _commit(context, sharding)


def _progress(context: Context) -> tuple[bool, list[str]]:
    """What earlier attempts left to do: (fidelity is done, tasks that aren't)."""
    tasks = [task for task in context.params.tasks if not _is_done(_task_file(context.work, task))]
    return _is_done(context.work / FIDELITY), list(dict.fromkeys(tasks))


def _is_done(file: Path) -> bool:
    """Whether an earlier attempt left its result in this file; one that is damaged is set aside."""
    try:
        content = read_json(file)
        problem = "" if content is None or isinstance(content, dict) else "holds no result"
    except ValueError as error:
        content, problem = None, f"is cut short or not JSON ({error})"
    if problem:
        set_aside(file, problem)
    return isinstance(content, dict)


def _dtype(context: Context) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, context.params.dtype)
    return dtype


def _load(context: Context, role: str, sharding: Sharding) -> FrozenModel:
    checkpoint = open_checkpoint(context.input_path(role))
    return FrozenModel(checkpoint, _dtype(context), context.params.batch_size, sharding, context.world)


def _commit(context: Context, sharding: Sharding) -> None:
    draft = context.open_draft()
    metrics: dict[str, Any] = {}
    if context.world.is_first:
        results = {task: read_json(_task_file(context.work, task)) for task in context.params.tasks}
        fidelity = read_json(context.work / FIDELITY)
        (draft / TASKS).mkdir()
        for task, result in results.items():
            write_json(_task_file(draft, task), result)
        details = {task: details_of(result) for task, result in results.items()}
        write_json(draft / RESULTS, {"fidelity": fidelity, "tasks": details, "limit": context.params.limit})
        scores = {name: score for task in results for name, score in scores_of(task, results[task]).items()}
        metrics = {"fidelity": fidelity, "tasks": scores, "sharding": sharding}
    context.commit(draft, metrics)


# Fidelity.


def _measure_fidelity(context: Context, sharding: Sharding) -> FrozenModel | None:
    """Compare the model with its dense original and keep the result; return the model, still loaded.

    Of the dense model only the head is read; it is its own reference, and not loaded for that.
    """
    states = DenseStates(context.input_path("reference"))
    device = context.world.device
    head = LayerReader(open_checkpoint(context.input_path("dense")), _dtype(context), device).head()
    is_dense = context.stage.inputs["model"].identity == context.stage.inputs["dense"].identity
    model = None if is_dense else _load(context, "model", sharding)
    sums: dict[int, FidelitySums] = {}
    mine = _my_windows(len(states.windows_ST), context.world)
    for done, index in enumerate(mine):
        context.progress.update("fidelity", done, len(mine))
        window_T = states.windows_ST[index]
        dense = Outputs(states.hidden(index).to(device), head.weight_VC, head.bias_V)
        with _outputs(model, window_T, dense) as outputs:
            sums[index] = compare_outputs(dense, outputs, next_ids(window_T).to(device))
    _save_fidelity(context, sums)
    return model


@contextmanager
def _outputs(model: FrozenModel | None, window_T: Tensor, dense: Outputs) -> Iterator[Outputs]:
    if model is None:
        yield dense
        return
    hidden_TC = model.final_hidden(window_T)
    with model.head() as (weight_VC, bias_V):
        yield Outputs(hidden_TC, weight_VC, bias_V)


def _save_fidelity(context: Context, sums: Mapping[int, FidelitySums]) -> None:
    """Add up in the order of the windows, so that the number of ranks changes no bit; divide once."""
    everybody = {index: window for share in context.world.gather(dict(sums)) for index, window in share.items()}
    if context.world.is_first:
        total = sum((everybody[index] for index in sorted(everybody)), FidelitySums())
        write_json(context.work / FIDELITY, plain(total.means()))
    context.progress.update("fidelity", 1, 1)
    context.interruption.stop_if_agreed(context.world)


def _my_windows(count: int, world: World) -> list[int]:
    """Windows of this rank; ranks with fewer repeat the last, since forwards of a sharded model are collective."""
    rounds = -(-count // world.size)
    return [min(step * world.size + world.rank, count - 1) for step in range(rounds)]


# Tasks.


def _evaluate_tasks(context: Context, model: FrozenModel, tasks: list[str]) -> None:
    """Evaluate task by task: rank 0 runs lm-eval, the others answer requests with it."""
    from hfprune_dist.evaluation.sharded_lm import ShardedLM

    params = context.params
    tokenizer = load_tokenizer(context.input_path("model"))
    lm = ShardedLM(model, tokenizer, context.interruption, params.batch_size, params.add_bos_token)
    if not context.world.is_first:
        lm.serve()
        return
    include_path = context.input_path("tasks") if context.has_input("tasks") else None
    loader = TaskLoader(tasks, include_path, _empty_folder(context.work / DATASETS))
    for task in tasks:
        context.progress.update(task, 0, 1)
        result = _run_task(context, lm, loader, task)
        write_json(_task_file(context.work, task), result)
    lm.dismiss()


def _empty_folder(folder: Path) -> Path:
    """A folder without what an earlier attempt left: the datasets library flushes nothing, and trusts what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _run_task(context: Context, lm: Any, loader: TaskLoader, task: str) -> dict[str, Any]:
    """lm-eval's result for one task or group, as a JSON value.

    Raises:
        UserError: naming the task, where its YAML file, its data or its functions fail.
    """
    from lm_eval.evaluator import evaluate

    from hfprune_dist.evaluation.sharded_lm import AnswerLog, ModelError

    params = context.params
    _seed_all()
    loaded = loader.load(task, params.num_fewshot)
    answers = AnswerLog(_task_file(context.work, task).with_suffix(".answers.jsonl"))
    with lm.task(answers, lambda done, total: context.progress.update(task, done, total)):
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
        except Exception as error:  # a task is code and data of others: anything can happen
            raise UserError(f"task {task!r} can't be evaluated: {explain(error)}") from error
    cleaned: dict[str, Any] = plain(result)
    return cleaned


def _task_file(folder: Path, task: str) -> Path:
    return folder / TASKS / f"{task}.json"


def _seed_all() -> None:
    """lm-eval's own seeds, set anew for each task, so that a resume sees the same examples."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _be_quiet() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap would fork a process with threads and a process group

"""Evaluate: fidelity to the dense model's reference, and lm-eval tasks, on a model that is loaded once.

Finished work is kept in the work folder: a killed stage resumes at the next windows of its current text, or at the next
chunk of requests of its current task.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.parameters import EvaluateParameters
from hfprune_dist.config.texts import FIRST, OTHER_TEXTS, compared_texts
from hfprune_dist.core.fidelity import FidelitySums, Outputs, compare_outputs, next_ids, standard_errors
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.distributed.frozen_model import DecidedSharding, FrozenModel, choose_sharding
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, details_of, plain, scores_of
from hfprune_dist.evaluation.task_index import explain
from hfprune_dist.models.single_layer import Head, LayerReader
from hfprune_dist.planning.memory import REQUEST_TOKENS, Evaluate
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import read_json, set_aside, write_json
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
    checkpoint = open_checkpoint(context.input_path("model"))
    job = Evaluate.of(context.params, REQUEST_TOKENS, checkpoint.max_positions)
    sharding = choose_sharding(context.runtime.sharding, job, checkpoint, context.world)
    texts, tasks = context.world.on_rank0(lambda: _left_to_do(context))
    model = None
    if texts:
        model = _measure_fidelity(context, sharding, texts)
    if tasks:
        _evaluate_tasks(context, model or _load(context, sharding), tasks)
    _commit(context, sharding)


def _left_to_do(context: Context) -> tuple[list[str], list[str]]:
    """Texts and tasks for which earlier attempts left no result."""
    texts = [text for text in _texts(context) if not _is_done(_fidelity_file(context.work, text))]
    tasks = [task for task in context.params.tasks if not _is_done(_task_file(context.work, task))]
    return texts, list(dict.fromkeys(tasks))


def _is_done(file: Path) -> bool:
    """Whether an earlier attempt left its result in this file; a damaged file is set aside."""
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


def _load(context: Context, sharding: DecidedSharding) -> FrozenModel:
    checkpoint = open_checkpoint(context.input_path("model"))
    return FrozenModel(checkpoint, _dtype(context), context.params.batch_size, sharding, context.world)


def _commit(context: Context, sharding: DecidedSharding) -> None:
    draft = context.open_draft()
    metrics = context.world.on_rank0(lambda: _write_results(context, draft))
    context.commit(draft, {**metrics, "sharding": sharding})


def _write_results(context: Context, draft: Path) -> dict[str, Any]:
    """Write the artifact, from the results in the work folder; return what the manifest has of them."""
    results = {task: read_json(_task_file(context.work, task)) for task in context.params.tasks}
    fidelity = {text: read_json(_fidelity_file(context.work, text)) for text in _texts(context)}
    summaries = {text: _summary(found) for text, found in fidelity.items()}
    (draft / TASKS).mkdir()
    for task, result in results.items():
        write_json(_task_file(draft, task), result)
    details = {task: details_of(result) for task, result in results.items()}
    write_json(draft / RESULTS, {**_by_place(fidelity), "tasks": details, "limit": context.params.limit})
    scores = {name: score for task in results for name, score in scores_of(task, results[task]).items()}
    return {**_by_place(summaries), "tasks": scores}


# Fidelity.


def _by_place(texts: Mapping[str, Any]) -> dict[str, Any]:
    """Arrange results by text: the first text's under one key, those of any others under another."""
    others = {text: found for text, found in texts.items() if text != FIRST}
    return {"fidelity": texts[FIRST], **({OTHER_TEXTS: others} if others else {})}


def _summary(fidelity: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fidelity.items() if name != BY_WINDOW}


def _texts(context: Context) -> dict[str, str]:
    """Name of each text -> role of the dense model's reference on it."""
    return compared_texts(context.stage.inputs)


def _measure_fidelity(context: Context, sharding: DecidedSharding, texts: Sequence[str]) -> FrozenModel | None:
    """Compare the model with its dense original on some texts and keep the results; return the model, still loaded.

    Only the head of the dense model is read. It is its own reference, so it isn't loaded to be measured itself.
    """
    head = _dense_head(context)
    is_dense = context.stage.inputs["model"].identity == context.stage.inputs["dense"].identity
    model = None if is_dense else _load(context, sharding)
    for text in texts:
        _save_fidelity(context, text, _compare(context, text, head, model))
    return model


def _dense_head(context: Context) -> Head:
    return LayerReader(open_checkpoint(context.input_path("dense")), _dtype(context), context.world.device).head()


def _compare(context: Context, text: str, head: Head, model: FrozenModel | None) -> dict[int, FidelitySums]:
    """Fidelity sums of each window of a text; collective."""
    world = context.world
    states = DenseStates(context.input_path(_texts(context)[text]))
    sums = world.on_rank0(lambda: _known_windows(context, text))
    mine = _my_windows([index for index in range(len(states.windows_ST)) if index not in sums], world)
    for done, index in enumerate(mine):
        context.progress.update(_phase(text), done, len(mine))
        sums |= dict(world.all_gather(_compared(index, states, head, model)))
        _save_windows(context, text, sums)
        context.interruption.stop_if_agreed(world)
    return sums


def _compared(index: int, states: DenseStates, head: Head, model: FrozenModel | None) -> tuple[int, FidelitySums]:
    """A window's number and its fidelity sums."""
    window_T, device = states.windows_ST[index], head.weight_VC.device
    with nullcontext() if model is None else _outputs(model, window_T, head) as outputs:
        dense = Outputs(states.hidden(index).to(device), head.weight_VC, head.bias_V, head.after)
        return index, compare_outputs(dense, dense if outputs is None else outputs, next_ids(window_T).to(device))


def _known_windows(context: Context, text: str) -> dict[int, FidelitySums]:
    """Fidelity sums of the windows with which earlier attempts were done."""
    file = _windows_file(context, text)
    return {int(index): FidelitySums(**it) for index, it in read_json(file).items()} if _is_done(file) else {}


def _save_windows(context: Context, text: str, sums: Mapping[int, FidelitySums]) -> None:
    if not all(math.isfinite(window.kl + window.nll) for window in sums.values()):
        raise UserError(f"{_phase(text)}: the model's outputs are NaN or infinite; check the checkpoint's weights")
    by_index = {str(index): asdict(window) for index, window in sums.items()}
    context.world.on_rank0(lambda: write_json(_windows_file(context, text), by_index))


@contextmanager
def _outputs(model: FrozenModel, window_T: Tensor, head: Head) -> Iterator[Outputs]:
    hidden_TC = model.final_hidden(window_T)
    with model.head() as (weight_VC, bias_V):
        yield Outputs(hidden_TC, weight_VC, bias_V, head.after)


def _save_fidelity(context: Context, text: str, sums: Mapping[int, FidelitySums]) -> None:
    """Add up in the order of the windows, so that the number of ranks changes no bit; divide once."""
    windows = [sums[index] for index in sorted(sums)]
    context.world.on_rank0(lambda: write_json(_fidelity_file(context.work, text), plain(_described(windows))))
    context.progress.update(_phase(text), 1, 1)
    context.interruption.stop_if_agreed(context.world)


def _described(windows: Sequence[FidelitySums]) -> dict[str, Any]:
    """A text's fidelity with its standard errors, and the fidelity of each of its windows."""
    means = sum(windows, FidelitySums()).means()
    alone = [window.means() for window in windows]
    by_window = {name: [it[name] for it in alone] for name in ("perplexity", "kl", "top1_agreement")}
    return {**means, **standard_errors(windows), "windows": len(windows), BY_WINDOW: by_window}


def _phase(text: str) -> str:
    return f"fidelity {text}".rstrip()


def _fidelity_file(folder: Path, text: str) -> Path:
    return folder / f"{_phase(text)}.json"


def _windows_file(context: Context, text: str) -> Path:
    return context.work / f"{f'windows {text}'.rstrip()}.json"


def _my_windows(left: Sequence[int], world: World) -> list[int]:
    """The windows of this rank; ranks with fewer repeat the last: forwards of sharded models are collective."""
    rounds = -(-len(left) // world.size)
    return [left[min(step * world.size + world.rank, len(left) - 1)] for step in range(rounds)]


# Tasks.


def _evaluate_tasks(context: Context, model: FrozenModel, tasks: list[str]) -> None:
    """Evaluate task by task: rank 0 runs lm-eval, and all ranks answer its requests."""
    from hfprune_dist.evaluation.sharded_lm import ShardedLM

    params = context.params
    tokenizer = load_tokenizer(context.input_path("model"))
    lm = ShardedLM(model, tokenizer, context.interruption, params.batch_size, params.add_bos_token)

    def evaluate_each() -> None:
        include_path = context.input_path("tasks") if context.has_input("tasks") else None
        loader = TaskLoader(tasks, include_path, _empty_folder(context.work / DATASETS))
        for task in tasks:
            context.progress.update(task, 0, 1)
            write_json(_task_file(context.work, task), _run_task(context, lm, loader, task))

    lm.run(evaluate_each)


def _empty_folder(folder: Path) -> Path:
    """Delete what an earlier attempt left: the datasets library flushes nothing, yet trusts the files that it finds."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _run_task(context: Context, lm: Any, loader: TaskLoader, task: str) -> dict[str, Any]:
    """lm-eval's result for one task or group, as a JSON value.

    Raises:
        UserError: naming the task, if its YAML file, its data or its functions fail.
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

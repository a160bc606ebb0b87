"""Efficiency: speed and memory of a model that generates, measured in turn with the dense model that it comes from.

It always has a single rank, with both models in memory. The stage is short: a killed one starts over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.engines import fit
from hfprune_dist.checkpoints.token_costs import token_costs
from hfprune_dist.engines.check import trusts
from hfprune_dist.engines.process import runs_of
from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.generation import Seconds, Workload, peak_bytes, time_generation, weight_bytes
from hfprune_dist.kinds.efficiency import EfficiencyParameters
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.stages.context import Context
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.machine import cpu_model, usable_cores

RESULTS = "efficiency.json"
BLOCK = 256  # tokens; engines' blocks are no larger
DENSE, MODEL = "dense", "model"

# By role of a model: the peak of its memory in bytes, weights included, if it is measured, and the times of each timed
# generation.
Measured = dict[str, tuple[int | None, list[Seconds]]]


def run(context: Context[EfficiencyParameters]) -> None:
    """Write ``efficiency.json``: what a token costs each model, and everything measured under each workload."""
    params, world, inputs = context.params, context.world, context.stage.inputs
    # The most demanding one last.
    workloads = [
        Workload(batch, tokens, params.new_tokens) for batch in params.batch_sizes for tokens in params.prompt_tokens
    ]
    # The dense one alone if both are the same.
    roles = [DENSE] if inputs[DENSE].identity == inputs[MODEL].identity else [DENSE, MODEL]
    checkpoints = {role: open_checkpoint(context.input_path(role)) for role in roles}
    measure = _in_transformers if params.engine is None else _in_engine
    version, measured = measure(context, checkpoints, workloads)
    device: dict[str, Any] = {"device": cpu_model(), "threads": torch.get_num_threads(), "cores": usable_cores()}
    if world.device.type == "cuda":
        device = {"device": torch.cuda.get_device_name(world.device)}
    metrics = {
        "engine": version,
        **device,
        **{role: _costs(checkpoints.get(role, checkpoints[DENSE]), params) for role in (DENSE, MODEL)},
        "runs": [_described(*pair) for pair in zip(workloads, measured, strict=True)],
    }
    seconds = [{role: [one._asdict() for one in times] for role, (_, times) in found.items()} for found in measured]
    draft = context.open_draft()
    write_json(draft / RESULTS, {**metrics, "seconds": seconds})
    context.commit(draft, metrics)


def _in_transformers(
    context: Context[EfficiencyParameters], checkpoints: Mapping[str, Checkpoint], workloads: Sequence[Workload]
) -> tuple[str, list[Measured]]:
    """The version, and what was measured."""
    params, world = context.params, context.world
    dtype = getattr(torch, params.dtype)
    models = {role: load_causal_lm(each.path, dtype, world.device).eval() for role, each in checkpoints.items()}
    measured: list[Measured] = []
    for done, workload in enumerate(workloads):
        context.progress.update(str(workload), done, len(workloads))
        measured.append(_measure(models, workload, params.repeats))
        context.interruption.stop_if_agreed(world)
    return f"transformers {transformers.__version__}", measured


def _in_engine(
    context: Context[EfficiencyParameters], checkpoints: Mapping[str, Checkpoint], workloads: Sequence[Workload]
) -> tuple[str, list[Measured]]:
    """The same in an engine, but for memory, of which it takes what it is given."""
    params, dense, engine = context.params, checkpoints[DENSE], context.params.engine
    assert engine is not None
    rows, tokens = max(params.batch_sizes), max(params.prompt_tokens) + params.new_tokens
    # Twice what is needed: blocks of the cache are rarely full, and an engine may pad heads.
    cache = 2 * rows * (tokens + BLOCK) * _costs(dense, params)["cache_bytes_per_token"]
    alike = {"dtype": params.dtype, "max_model_len": tokens, "max_num_seqs": rows, "kv_cache_memory_bytes": cache}
    own = {}
    for role, one in checkpoints.items():
        if not (fits := fit(engine, one.config)).loads:
            raise UserError(f"{one.path}: {engine} won't load it: {fits.told}")
        own[role] = {"model": str(one.path), "trust_remote_code": trusts(one.path), **fits.options}
    request = {
        "models": {role: alike | options for role, options in own.items()},
        "workloads": [one.prompts(dense.config["vocab_size"], torch.device("cpu")).tolist() for one in workloads],
        "new_tokens": params.new_tokens,
        "repeats": params.repeats,
        "threads": torch.get_num_threads(),
    }
    context.progress.update(engine, 0, 1)
    python = context.runtime.python_of(engine)
    version, runs = runs_of(engine, python, context.work, request)
    return version, [{role: (None, [Seconds(*pair) for pair in times]) for role, times in run.items()} for run in runs]


def _measure(models: Mapping[str, PreTrainedModel], workload: Workload, repeats: int) -> Measured:
    """Measure each model: one generation for its memory, which also warms it up, then timed ones in turn."""
    generations: dict[str, Callable[[], Seconds]] = {}
    measured: Measured = {}
    for role, model in models.items():
        prompts_BT = workload.prompts(model.config.get_text_config().vocab_size, model.device)
        generations[role] = partial(time_generation, model, prompts_BT, workload.new_tokens)
        measured[role] = weight_bytes(model) + peak_bytes(generations[role], model.device), []
    for _ in range(repeats):
        for role, generate in generations.items():
            measured[role][1].append(generate())
    return measured


def _costs(checkpoint: Checkpoint, params: EfficiencyParameters) -> dict[str, int]:
    """Costs of a token, at the largest number of tokens in a prompt."""
    costs = token_costs(checkpoint)
    return {
        "parameters": costs.parameters,
        "active_parameters": costs.active_parameters,
        # Without the headers of their files, which a table's size includes.
        "weight_bytes_on_disk": sum(tensor.bytes for tensor in checkpoint.tensors.values()),
        "flops_per_token": costs.flops(max(params.prompt_tokens)),
        "cache_bytes_per_token": costs.cached_channels * getattr(torch, params.dtype).itemsize,
    }


def _described(workload: Workload, measured: Measured) -> dict[str, Any]:
    """Results of a workload: those of both models, and the model's speed relative to the dense one, pair by pair."""
    found = {DENSE: measured[DENSE], MODEL: measured.get(MODEL, measured[DENSE])}
    decoded = workload.batch_size * (workload.new_tokens - 1)
    described = asdict(workload)
    for role, (peak, times) in found.items():
        described[role] = {
            "peak_memory_bytes": peak,
            "time_to_first_token_s": _spread([one.first for one in times]),
            "decode_tokens_per_s": _spread([decoded / one.others for one in times]),
        }
    pairs = list(zip(found[DENSE][1], found[MODEL][1], strict=True))
    described["first_token_speed"] = _spread([one.first / other.first for one, other in pairs])
    described["decode_speed"] = _spread([one.others / other.others for one, other in pairs])
    return described


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}

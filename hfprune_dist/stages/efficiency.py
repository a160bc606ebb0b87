"""Efficiency: speed and memory of a model that generates, measured in turn with the dense model that it comes from.

It always has a single rank, with both models in memory. The stage is short: a killed one starts over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.token_costs import TokenCosts
from hfprune_dist.evaluation.generation import Seconds, Workload, peak_bytes, time_generation, weight_bytes
from hfprune_dist.kinds.efficiency import EfficiencyParameters
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.machine import usable_cores
from hfprune_dist.store.provenance import cpu_model

Context = AnyContext[EfficiencyParameters]

RESULTS = "efficiency.json"
DENSE, MODEL = "dense", "model"


@dataclass(frozen=True)
class Measured:
    """The measurements of one model under one workload.

    Attributes:
        peak_memory_bytes: weights, plus the most memory that a generation took in addition to them.
        seconds: the times of each timed generation.
    """

    peak_memory_bytes: int
    seconds: Sequence[Seconds]


def run(context: Context) -> None:
    """Write ``efficiency.json``: what a token costs each model, and everything measured under each workload."""
    models: dict[str, PreTrainedModel] = {}  # on rank 0; large ones take minutes to read
    context.world.on_rank0(lambda: models.update(_load(context)))
    workloads = workloads_of(context.params)
    measured: list[Mapping[str, Measured]] = []
    for done, workload in enumerate(workloads):
        context.progress.update(str(workload), done, len(workloads))
        measured.append(context.world.on_rank0(partial(_measure, models, workload, context.params.repeats)))
        context.interruption.stop_if_agreed(context.world)
    draft = context.open_draft()
    metrics = {
        **_device(context.world.device),
        **{role: _costs(context, role) for role in (DENSE, MODEL)},
        "runs": [_described(*pair) for pair in zip(workloads, measured, strict=True)],
    }
    seconds = [{role: asdict(it)["seconds"] for role, it in found.items()} for found in measured]
    context.world.on_rank0(lambda: write_json(draft / RESULTS, {**metrics, "seconds": seconds}))
    context.commit(draft, metrics)


def workloads_of(params: EfficiencyParameters) -> list[Workload]:
    """The workloads to measure, the most demanding one last."""
    return [
        Workload(batch_size, prompt_tokens, params.new_tokens)
        for batch_size in params.batch_sizes
        for prompt_tokens in params.prompt_tokens
    ]


def _load(context: Context) -> dict[str, PreTrainedModel]:
    """Load the dense model and, if it is another one, the model: role -> model."""
    dtype, inputs = getattr(torch, context.params.dtype), context.stage.inputs
    roles = [DENSE] if inputs[DENSE].identity == inputs[MODEL].identity else [DENSE, MODEL]
    loaded = {role: load_causal_lm(context.input_path(role), dtype) for role in roles}
    return {role: model.to(context.world.device).eval() for role, model in loaded.items()}


def _measure(models: Mapping[str, PreTrainedModel], workload: Workload, repeats: int) -> dict[str, Measured]:
    """Measure each model, by role: one generation for its memory, which also warms it up, then timed ones in turn."""
    generations: dict[str, Callable[[], Seconds]] = {}
    memory: dict[str, int] = {}
    for role, model in models.items():
        prompts_BT = workload.prompts(model.config.get_text_config().vocab_size, model.device)
        generations[role] = partial(time_generation, model, prompts_BT, workload.new_tokens)
        memory[role] = weight_bytes(model) + peak_bytes(generations[role], model.device)
    seconds: dict[str, list[Seconds]] = {role: [] for role in models}
    for _ in range(repeats):
        for role, generate in generations.items():
            seconds[role].append(generate())
    return {role: Measured(memory[role], seconds[role]) for role in models}


# Contents of the manifest and of ``efficiency.json``.


def _device(device: torch.device) -> dict[str, Any]:
    """The device that the models were measured on; of a CPU also its threads, and the cores that these could use."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": cpu_model(), "threads": torch.get_num_threads(), "cores": usable_cores()}


def _costs(context: Context, role: str) -> dict[str, int]:
    """Costs of a token, at the largest number of tokens in a prompt."""
    checkpoint = open_checkpoint(context.input_path(role))
    costs = TokenCosts.of(checkpoint)
    return {
        "parameters": costs.parameters,
        "parameters_without_embeddings": costs.parameters_without_embeddings,
        "active_parameters": costs.active_parameters,
        "weight_bytes_on_disk": _bytes_on_disk(checkpoint),
        "flops_per_token": costs.flops(max(context.params.prompt_tokens)),
        "cache_bytes_per_token": costs.cache_bytes(getattr(torch, context.params.dtype).itemsize),
    }


def _bytes_on_disk(checkpoint: Checkpoint) -> int:
    """Bytes of all weights, without the headers of their files, which a table's size includes."""
    return sum(tensor.bytes for tensor in checkpoint.tensors.values())


def _described(workload: Workload, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Results of a workload: those of both models, and the model's speed relative to the dense one, pair by pair."""
    dense, model = measured[DENSE], measured.get(MODEL, measured[DENSE])
    pairs = list(zip(dense.seconds, model.seconds, strict=True))
    return {
        **asdict(workload),
        DENSE: _summary(workload, dense),
        MODEL: _summary(workload, model),
        "first_token_speed": _spread([one.first / other.first for one, other in pairs]),
        "decode_speed": _spread([one.others / other.others for one, other in pairs]),
    }


def _summary(workload: Workload, measured: Measured) -> dict[str, Any]:
    decoded = workload.batch_size * (workload.new_tokens - 1)
    return {
        "peak_memory_bytes": measured.peak_memory_bytes,
        "time_to_first_token_s": _spread([it.first for it in measured.seconds]),
        "decode_tokens_per_s": _spread([decoded / it.others for it in measured.seconds]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}

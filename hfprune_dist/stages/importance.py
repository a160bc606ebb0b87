"""Importance: score every MLP neuron over the calibration windows, on a model sharded over all ranks.

Any number of criteria share the pass: one forward, one pass over the logits, one backward for each loss. Windows are
cut into fixed shards, whatever the number of ranks; ranks work on consecutive shards, and the shards' sums are added in
shard order. So the sums have the same bits on any number of ranks, and a resume goes on at a shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfprune_dist.core.criteria import CRITERIA, Criterion, losses_of
from hfprune_dist.core.importance import NonFiniteError
from hfprune_dist.data.windows import read_windows
from hfprune_dist.errors import UserError
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.models.tokenizer import load_tokenizer
from hfprune_dist.models.weights import mlp_layer
from hfprune_dist.parallel.calibration import Calibration, Sums
from hfprune_dist.stages.context import Context

PARTIAL = "partial.safetensors"
WINDOWS = "windows.safetensors"


@dataclass
class _Totals:
    """What the calibration pass has added up over the shards before ``next_shard``.

    Attributes:
        sums_KLD: float64 [criteria with a sum, num_layers, intermediate_size].
        losses: loss name -> sum over windows of the loss per token.
    """

    sums_KLD: Tensor
    losses: dict[str, float] = field(default_factory=dict)
    next_shard: int = 0


def run(context: Context) -> None:
    """Write ``importance.safetensors`` and ``windows.safetensors``."""
    checkpoint = open_checkpoint(context.input_path("model"))
    criteria = [CRITERIA[name] for name in context.params["criteria"]]
    documents = _prepare_windows(context)
    windows_ST = load_file(context.work / WINDOWS)["input_ids"]
    totals = _accumulate(context, checkpoint, windows_ST, _summed(criteria))
    draft = context.open_draft()
    if context.world.is_first:
        save_file(_scores(context, checkpoint, criteria, totals), draft / "importance.safetensors")
        save_file({"input_ids": windows_ST}, draft / WINDOWS)
    losses = [loss for loss in losses_of(criteria) if loss.in_nats]
    means = {f"mean_{loss.name}_nats": totals.losses[loss.name] / len(windows_ST) for loss in losses}
    context.commit(draft, {"tokens": windows_ST.numel(), **means, **documents})


def _summed(criteria: Sequence[Criterion]) -> list[Criterion]:
    """Criteria that need the calibration pass."""
    return [criterion for criterion in criteria if criterion.summed != "nothing"]


def _scores(
    context: Context, checkpoint: Checkpoint, criteria: Sequence[Criterion], totals: _Totals
) -> dict[str, Tensor]:
    """``layers.<i>.<criterion>`` -> float64 [intermediate_size]; weights are read one layer at a time."""
    sums = dict(zip([criterion.name for criterion in _summed(criteria)], totals.sums_KLD, strict=True))
    nothing_D = torch.zeros(checkpoint.intermediate_size, dtype=torch.float64)
    scores = {}
    for number in range(checkpoint.num_layers):
        layer = mlp_layer(checkpoint, number, context.params["seed"])
        for criterion in criteria:
            sum_D = sums[criterion.name][number] if criterion.name in sums else nothing_D
            scores_D = criterion.finish(sum_D, layer).clone()
            if not scores_D.isfinite().all():
                raise UserError(
                    f"importance: {criterion.name} of layer {number} is NaN or infinite; check the checkpoint's weights"
                )
            scores[f"layers.{number}.{criterion.name}"] = scores_D
    return scores


def _prepare_windows(context: Context) -> dict[str, int]:
    """Cut the calibration windows on rank 0 and leave them in the work folder; return counts for the manifest."""
    if not context.world.is_first:
        return context.world.broadcast({})
    settings = context.params["calibration"]
    path = context.input_path("calibration") if context.has_input("calibration") else None
    windows = read_windows(
        settings,
        path,
        load_tokenizer(context.input_path("model")),
        context.params["add_bos_token"],
        settings["samples"],
        context.params["seed"],
        "calibration",
    )
    save_file({"input_ids": windows.input_ids_ST}, context.work / WINDOWS)
    counts = {"documents_read": windows.documents_read, "documents_used": windows.documents_used}
    return context.world.broadcast(counts)


def _calibration(
    context: Context, checkpoint: Checkpoint, windows_ST: Tensor, criteria: Sequence[Criterion]
) -> Calibration:
    params = context.params
    return Calibration(
        checkpoint,
        getattr(torch, params["dtype"]),
        windows_ST,
        criteria,
        params["seed"],
        params["calibration"]["micro_batch_size"],
        context.world,
        context.runtime.activation_checkpointing,
    )


def _accumulate(context: Context, checkpoint: Checkpoint, windows_ST: Tensor, criteria: Sequence[Criterion]) -> _Totals:
    """Add up all shards in shard order; nothing to do, and no model to load, where no criterion sums anything."""
    totals = _resume(context, checkpoint, criteria)
    if not criteria:
        return totals
    world = context.world
    shards = _shards(len(windows_ST), context.params["calibration"])
    calibration = _calibration(context, checkpoint, windows_ST, criteria) if totals.next_shard < len(shards) else None
    while totals.next_shard < len(shards):
        assert calibration is not None
        context.progress.update("calibration", totals.next_shard, len(shards))
        # Ranks beyond the last shard repeat it: under ZeRO-3 every rank must take part in every forward.
        mine = min(totals.next_shard + world.rank, len(shards) - 1)
        shard = _explained(calibration, shards[mine], mine)
        losses = world.gather(shard.losses)
        for source in range(min(world.size, len(shards) - totals.next_shard)):
            received_KLD = shard.neurons_KLD.clone()
            world.broadcast_tensor(received_KLD, source)
            totals.sums_KLD += received_KLD
            totals.losses = {name: totals.losses.get(name, 0.0) + value for name, value in losses[source].items()}
        totals.next_shard = min(totals.next_shard + world.size, len(shards))
        if world.is_first:
            _save(context.work / PARTIAL, totals, criteria)
        context.interruption.stop_if_agreed(world)
    context.progress.update("calibration", totals.next_shard, len(shards))
    return totals


def _shards(windows: int, settings: Mapping[str, int]) -> list[list[range]]:
    """Numbers of the windows of each micro-batch of each shard."""
    size = settings["micro_batch_size"]
    micro_batches = [range(start, min(start + size, windows)) for start in range(0, windows, size)]
    per_shard = settings["shard_size"]
    return [micro_batches[start : start + per_shard] for start in range(0, len(micro_batches), per_shard)]


def _explained(calibration: Calibration, shard: Sequence[range], number: int) -> Sums:
    try:
        return calibration.score(shard)
    except NonFiniteError as error:
        raise UserError(f"importance, calibration shard {number}: {error}; check the checkpoint's weights") from None


def _resume(context: Context, checkpoint: Checkpoint, criteria: Sequence[Criterion]) -> _Totals:
    """Where an earlier attempt stopped (rank 0 reads, all learn)."""
    shape = (len(criteria), checkpoint.num_layers, checkpoint.intermediate_size)
    totals = _Totals(torch.zeros(shape, dtype=torch.float64))
    file = context.work / PARTIAL
    saved = load_file(file) if context.world.is_first and file.is_file() else {}
    sums = [saved.get(f"sums.{criterion.name}") for criterion in criteria]
    if criteria and all(sum_LD is not None for sum_LD in sums):
        totals.sums_KLD = torch.stack([sum_LD for sum_LD in sums if sum_LD is not None])
        totals.losses = {loss.name: float(saved[f"loss.{loss.name}"]) for loss in losses_of(criteria)}
        totals.next_shard = int(saved["next_shard"])
    return context.world.broadcast(totals)


def _save(file: Path, totals: _Totals, criteria: Sequence[Criterion]) -> None:
    draft = file.with_suffix(".draft")
    sums = {
        f"sums.{criterion.name}": sum_LD.clone() for criterion, sum_LD in zip(criteria, totals.sums_KLD, strict=True)
    }
    losses = {f"loss.{name}": torch.tensor(value, dtype=torch.float64) for name, value in totals.losses.items()}
    save_file({"next_shard": torch.tensor(totals.next_shard), **sums, **losses}, draft)
    draft.replace(file)

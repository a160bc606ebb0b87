"""Importance: score every MLP neuron over the calibration windows, on a model sharded over all ranks.

Any number of criteria share the pass: one forward, one pass over the logits, one backward for each loss; a loss of a
student adds a forward. Windows are cut into fixed shards, whatever the number of ranks; ranks work on consecutive
shards, and the shards' sums are added in shard order. So the sums have the same bits on any number of ranks, and a
resume goes on at a shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hfprune_dist.core.criteria import CRITERIA, Criterion, MlpLayer, Moments, losses_of
from hfprune_dist.core.exact import ExactOverflowError
from hfprune_dist.core.importance import NonFiniteError
from hfprune_dist.data.windows import load_windows, read_windows, save_windows
from hfprune_dist.errors import UserError
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.models.tokenizer import load_tokenizer
from hfprune_dist.models.weights import mlp_layer
from hfprune_dist.parallel.accumulation import Accumulation
from hfprune_dist.parallel.calibration import Calibration
from hfprune_dist.parallel.layerwise import LayerStream
from hfprune_dist.parallel.probe import PROBE, obtain_probe, record_probe
from hfprune_dist.stages.context import Context

PARTIAL = "partial.safetensors"


def run(context: Context) -> None:
    """Write ``importance.safetensors`` and ``windows.safetensors``; of a calibration pass also its probe."""
    checkpoint = open_checkpoint(context.input_path("model"))
    criteria = [CRITERIA[name] for name in context.params["criteria"]]
    documents = _prepare_windows(context)
    windows_ST = load_windows(context.work)
    totals = _accumulate(context, checkpoint, windows_ST, _summed(criteria))
    windows_ST = windows_ST[: _windows_used(context, totals, len(windows_ST))]
    scores = _scores(context, checkpoint, criteria, totals, windows_ST)
    draft = context.open_draft()
    if context.world.is_first:
        save_file(scores, draft / "importance.safetensors")
        save_windows(windows_ST, draft)
        if (context.work / PROBE).is_file():
            shutil.copyfile(context.work / PROBE, draft / PROBE)
    losses = [loss for loss in losses_of(criteria) if loss.in_nats]
    means = {f"mean_{loss.name}_nats": totals.losses[loss.name] / len(windows_ST) for loss in losses}
    context.commit(draft, {"tokens": windows_ST.numel(), **means, **documents, **_curve(context, totals)})


def _windows_used(context: Context, totals: Accumulation, windows: int) -> int:
    """All of them, but where the pass ended early."""
    return min(totals.next_shard * _windows_per_shard(context), windows) if totals.shards else windows


def _windows_per_shard(context: Context) -> int:
    calibration = context.params["calibration"]
    return int(calibration["shard_size"] * calibration["micro_batch_size"])


def _curve(context: Context, totals: Accumulation) -> dict[str, Any]:
    """How the kept set settled: overlap of what two halves of the windows keep, by windows, criterion and share."""
    points = [
        {
            "windows": shards * _windows_per_shard(context),
            "criterion": name,
            "compared": CRITERIA[name].compared,
            "share_kept": share,
            "overlap": value,
        }
        for (shards, name, share), value in totals.curve.items()
    ]
    return {"split_half_overlap": points} if points else {}


def _summed(criteria: Sequence[Criterion]) -> list[Criterion]:
    """Criteria that need the calibration pass."""
    return [criterion for criterion in criteria if criterion.summed != "nothing"]


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
    save_windows(windows.input_ids_ST, context.work)
    counts = {"documents_read": windows.documents_read, "documents_used": windows.documents_used}
    return context.world.broadcast(counts)


def _calibration(
    context: Context, checkpoint: Checkpoint, windows_ST: Tensor, criteria: Sequence[Criterion]
) -> Calibration:
    params = context.params
    calibration = Calibration(
        checkpoint,
        getattr(torch, params["dtype"]),
        windows_ST,
        criteria,
        params["seed"],
        params["calibration"]["micro_batch_size"],
        context.world,
        context.runtime.activation_checkpointing,
    )
    if context.world.is_first and not (context.work / PROBE).is_file():
        record_probe(calibration.module, checkpoint.family, context.work / PROBE)
    return calibration


def _accumulate(
    context: Context, checkpoint: Checkpoint, windows_ST: Tensor, criteria: Sequence[Criterion]
) -> Accumulation:
    """Add up all shards; nothing to do, and no model to load, where no criterion sums anything."""
    shards = _shards(len(windows_ST), context.params["calibration"]) if criteria else []
    shape = (checkpoint.num_layers, checkpoint.intermediate_size, checkpoint.config["hidden_size"])
    settled = context.params["calibration"]["settled"]
    totals = Accumulation(criteria, shape, len(shards), context.work / PARTIAL, context.world, settled)
    calibration = None
    if not totals.is_complete:
        calibration = _calibration(context, checkpoint, windows_ST, criteria)
        with _explaining(0):
            calibration.choose_student(shards[0])
    while not totals.is_complete:
        assert calibration is not None
        context.progress.update("calibration", totals.next_shard, len(shards))
        longest = shards[totals.next_shard]  # of the round: none but the last shard has fewer micro-batches
        with _explaining(totals.mine):
            totals.add_round(calibration.score(shards[totals.mine], forwards=len(longest)))
        context.interruption.stop_if_agreed(context.world)
    context.progress.update("calibration", len(shards), len(shards))
    if calibration is not None:
        calibration.release()
    return totals


@contextmanager
def _explaining(shard: int) -> Iterator[None]:
    try:
        yield
    except (NonFiniteError, ExactOverflowError) as error:
        raise UserError(f"importance, calibration shard {shard}: {error}; check the checkpoint's weights") from None


def _shards(windows: int, settings: Mapping[str, int]) -> list[list[range]]:
    """Numbers of the windows of each micro-batch of each shard."""
    size = settings["micro_batch_size"]
    micro_batches = [range(start, min(start + size, windows)) for start in range(0, windows, size)]
    per_shard = settings["shard_size"]
    return [micro_batches[start : start + per_shard] for start in range(0, len(micro_batches), per_shard)]


def _scores(
    context: Context,
    checkpoint: Checkpoint,
    criteria: Sequence[Criterion],
    totals: Accumulation,
    windows_ST: Tensor,
) -> dict[str, Tensor]:
    """``layers.<i>.<criterion>`` -> float64 [intermediate_size]; weights are read one layer at a time.

    Ranks take turns: each finishes the scores of one layer of as many as there are ranks, all at the same time.
    """
    world = context.world
    walk = _Walk(context, checkpoint, criteria, totals, windows_ST)
    mine: dict[str, Tensor] = {}
    waiting: MlpLayer | None = None
    for number in range(checkpoint.num_layers):
        moments = walk.moments(number)
        if number % world.size == world.rank:
            waiting = mlp_layer(checkpoint, number, context.params["seed"], moments)
        del moments  # those of another rank's layer, while this one solves
        if waiting is not None and ((number + 1) % world.size == 0 or number + 1 == checkpoint.num_layers):
            mine |= _layer_scores(waiting, criteria, totals)
            waiting = None
    return {name: scores_D for share in world.gather(mine) for name, scores_D in share.items()}


class _Walk:
    """The second walk over the windows, layer by layer, for the criteria that need moments."""

    def __init__(
        self,
        context: Context,
        checkpoint: Checkpoint,
        criteria: Sequence[Criterion],
        totals: Accumulation,
        windows_ST: Tensor,
    ) -> None:
        self._context = context
        self._layers = checkpoint.num_layers
        self._tokens = windows_ST.numel()
        self._stream = None
        if any(criterion.needs_moments for criterion in criteria):
            dtype = getattr(torch, context.params["dtype"])
            size = context.params["calibration"]["micro_batch_size"]
            where = checkpoint, windows_ST, dtype, size, context.world
            probe = obtain_probe(*where, saved=context.work / PROBE, sharding=context.runtime.sharding)
            self._stream = LayerStream(*where, probe)
            self._totals = totals

    def moments(self, number: int) -> Moments | None:
        """The moments of the next layer; collective."""
        if self._stream is None:
            return None
        self._context.progress.update("moments", number, self._layers)
        self._context.interruption.stop_if_agreed(self._context.world)
        grams = self._stream.grams(number, self._stream.layer(number))
        curvature_CC = self._totals.mean_curvature(number, self._tokens)
        return Moments(grams.whole(), curvature_CC.to(self._context.world.device), self._tokens)


def _layer_scores(layer: MlpLayer, criteria: Sequence[Criterion], totals: Accumulation) -> dict[str, Tensor]:
    sums = dict(zip([criterion.name for criterion in _summed(criteria)], totals.sums_KLD, strict=True))
    nothing_D = torch.zeros(layer.intermediate_size, dtype=torch.float64)
    scores = {}
    for criterion in criteria:
        sum_D = sums[criterion.name][layer.number] if criterion.name in sums else nothing_D
        scores_D = criterion.finish(sum_D, layer).clone()
        if not scores_D.isfinite().all():
            raise UserError(
                f"importance: {criterion.name} of layer {layer.number} is NaN or infinite; "
                "check the checkpoint's weights"
            )
        scores[f"layers.{layer.number}.{criterion.name}"] = scores_D
    return scores

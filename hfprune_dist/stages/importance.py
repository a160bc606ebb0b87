"""Importance: score every MLP neuron over the calibration windows, on a model sharded over all ranks.

Windows are cut into fixed shards, whatever the number of ranks; ranks work on consecutive shards, and the shards'
scores are added in shard order. So the sum has the same bits on any number of ranks, and a resume goes on at a shard.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfprune_dist.core.entropy import entropy_gradient
from hfprune_dist.core.head import head_gradient
from hfprune_dist.core.importance import NonFiniteError, TaylorScores
from hfprune_dist.data.text import field_of, read_records
from hfprune_dist.data.windows import in_random_order, sample_windows
from hfprune_dist.errors import UserError
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.models.tokenizer import bos_id, load_tokenizer, plain_ids
from hfprune_dist.parallel.zero3 import gathered, load_frozen
from hfprune_dist.stages.context import Context

PARTIAL = "partial.safetensors"
WINDOWS = "windows.safetensors"


def run(context: Context) -> None:
    """Write ``importance.safetensors`` and ``windows.safetensors``."""
    checkpoint = open_checkpoint(context.input_path("model"))
    documents = _prepare_windows(context)
    windows_ST = load_file(context.work / WINDOWS)["input_ids"]
    scores_LD, entropy = _accumulate(context, checkpoint, windows_ST)
    draft = context.open_draft()
    if context.world.is_first:
        named = {f"layers.{layer}.entropy": row.clone() for layer, row in enumerate(scores_LD)}
        save_file(named, draft / "importance.safetensors")
        save_file({"input_ids": windows_ST}, draft / WINDOWS)
    context.commit(draft, {"tokens": windows_ST.numel(), "mean_entropy_nats": entropy, **documents})


def _prepare_windows(context: Context) -> dict[str, int]:
    """Cut the calibration windows on rank 0 and leave them in the work folder; return counts for the manifest."""
    if not context.world.is_first:
        return context.world.broadcast({})
    settings = context.params["calibration"]
    path = context.input_path("calibration") if context.has_input("calibration") else None
    where = f"calibration {path or settings['dataset']}"
    tokenizer = load_tokenizer(context.input_path("model"))
    seed = context.params["seed"]
    records = read_records(settings, path, seed)
    texts = (field_of(record, settings["text_field"], where) for record in records)
    windows = sample_windows(
        texts if path is None else in_random_order(texts, seed),
        lambda text: plain_ids(tokenizer, text),
        bos_id(tokenizer, context.params["add_bos_token"]),
        settings["samples"],
        settings["sequence_length"],
        seed,
        where,
    )
    save_file({"input_ids": windows.input_ids_ST}, context.work / WINDOWS)
    counts = {"documents_read": windows.documents_read, "documents_used": windows.documents_used}
    return context.world.broadcast(counts)


class _Pass:
    """The calibration pass on one rank: from a micro-batch of windows to scores."""

    def __init__(self, context: Context, checkpoint: Checkpoint, micro_batch_size: int) -> None:
        dtype = getattr(torch, context.params["dtype"])
        self.device = context.world.device
        self.model = load_frozen(checkpoint.path, dtype, micro_batch_size, context.world)
        self.body = checkpoint.family.body_of(self.model)
        self.head = checkpoint.family.head_of(self.model)
        self.down_projections: list[nn.Module] = checkpoint.family.down_projections(self.model)
        self.intermediate_size = checkpoint.intermediate_size

    def score(self, micro_batches: list[Tensor]) -> tuple[Tensor, float]:
        """Scores [num_layers, intermediate_size] of some micro-batches, and the sum of their windows' entropies."""
        taylor = TaylorScores(self.down_projections, self.intermediate_size)
        entropy = 0.0
        for input_ids_BT in micro_batches:
            with taylor.observe():
                entropy += self._forward_backward(input_ids_BT.to(self.device))
        return taylor.scores_LD, entropy

    def _forward_backward(self, input_ids_BT: Tensor) -> float:
        hidden_BTC = self.body(input_ids=input_ids_BT, use_cache=False).last_hidden_state
        hidden_NC = hidden_BTC.detach().flatten(0, 1)
        with gathered(self.head) as (weight_VC, bias_V):
            entropy_N, gradient_NC = head_gradient(hidden_NC, weight_VC, bias_V, entropy_gradient)
        # Entropy is the mean over a window's tokens, scores are summed over windows.
        tokens = input_ids_BT.shape[1]
        hidden_BTC.backward(gradient_NC.view_as(hidden_BTC) / tokens)
        return entropy_N.sum(dtype=torch.float64).item() / tokens


def _accumulate(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> tuple[Tensor, float]:
    """Add up all shards' scores in shard order; return them and the mean entropy per token."""
    settings = context.params["calibration"]
    world = context.world
    micro_batches = list(windows_ST.split(settings["micro_batch_size"]))
    size = settings["shard_size"]
    shards = [micro_batches[start : start + size] for start in range(0, len(micro_batches), size)]
    first, total_LD, entropy = _resume(context, (checkpoint.num_layers, checkpoint.intermediate_size))
    calibration = _Pass(context, checkpoint, settings["micro_batch_size"]) if first < len(shards) else None
    while first < len(shards):
        assert calibration is not None
        context.progress.update("calibration", first, len(shards))
        # Ranks beyond the last shard repeat it: under ZeRO-3 every rank must take part in every forward.
        mine = min(first + world.rank, len(shards) - 1)
        scores_LD, shard_entropy = _explained(calibration, shards[mine], mine)
        for source in range(min(world.size, len(shards) - first)):
            received_LD = scores_LD.clone()
            world.broadcast_tensor(received_LD, source)
            total_LD += received_LD
        entropy += sum(world.gather(shard_entropy)[: len(shards) - first])
        first = min(first + world.size, len(shards))
        if world.is_first:
            _save(context.work / PARTIAL, first, total_LD, entropy)
        context.interruption.stop_if_agreed(world)
    context.progress.update("calibration", first, len(shards))
    return total_LD, entropy / len(windows_ST)


def _explained(calibration: _Pass, shard: list[Tensor], number: int) -> tuple[Tensor, float]:
    try:
        return calibration.score(shard)
    except NonFiniteError as error:
        raise UserError(f"importance, calibration shard {number}: {error}; check the checkpoint's weights") from None


def _resume(context: Context, shape: tuple[int, int]) -> tuple[int, Tensor, float]:
    """Where an earlier attempt stopped: next shard, scores so far, entropy so far (rank 0 reads, all learn)."""
    state = (0, torch.zeros(shape, dtype=torch.float64), 0.0)
    if context.world.is_first and (context.work / PARTIAL).is_file():
        saved = load_file(context.work / PARTIAL)
        state = (int(saved["next_shard"]), saved["scores"], float(saved["entropy"]))
    return context.world.broadcast(state)


def _save(file: Path, next_shard: int, scores_LD: Tensor, entropy: float) -> None:
    draft = file.with_suffix(".draft")
    save_file(
        {
            "next_shard": torch.tensor(next_shard),
            "scores": scores_LD,
            "entropy": torch.tensor(entropy, dtype=torch.float64),
        },
        draft,
    )
    draft.replace(file)

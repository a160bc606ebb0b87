"""The refit of what a prune stage writes, on the calibration windows and on copies of them with redrawn tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.tensor_files import is_usable, load_tensors, save_tensors
from hfprune_dist.core.redraw import redrawn_copies
from hfprune_dist.distributed.sums import windows_held_out
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.measurement import normed_outputs
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages.prune_refit import (
    Context,
    after_each_layer,
    outputs_of_dense,
    pruned_kinds,
    refit_layers,
)
from hfprune_dist.structures.kept import Kept


def final_refit(context: Context, checkpoint: Checkpoint, kept: Kept) -> RefittedLayers:
    """Refit what the stage will write, as its settings say; collective."""
    kinds, whole_mlp = pruned_kinds(context, checkpoint), context.params.refit == "block"
    fitted = RefittedLayers(checkpoint, kinds, whole_mlp, context.work / "refit")
    refit_layers(context, checkpoint, kept, _windows(context, checkpoint), fitted, phase="refit")
    return fitted


def _windows(context: Context, checkpoint: Checkpoint) -> Tensor:
    """The calibration windows, and ``refit_copies`` of each, int64 [windows, sequence_length].

    Ranks share it, and rank 0 saves it for later attempts.
    """
    windows_ST, saved = context.calibration_windows(), context.work / "copies.safetensors"
    if not context.params.refit_copies:
        return windows_ST
    if not context.world.on_rank0(lambda: is_usable(saved)):
        copies_SRT = _redrawn(context, checkpoint, windows_ST)
        context.world.on_rank0(lambda: save_tensors({"copies": copies_SRT}, saved))
    copies_SRT = load_tensors(saved)[0]["copies"].long()
    return in_refit_order(windows_ST, copies_SRT, context.params.forward_pass()[1])


def _redrawn(context: Context, checkpoint: Checkpoint, windows_ST: Tensor) -> Tensor:
    """Copies of all windows, int32 [windows, copies of each, tokens], on every rank."""
    (name, size), world = context.params.forward_pass(), context.world
    batches = dict(enumerate(windows_ST.split(size)))
    hidden = outputs_of_dense(context, checkpoint, batches)
    head = LayerReader(checkpoint, getattr(torch, name), world.device).head()
    rounds = range(0, len(batches), world.size)
    after_each = after_each_layer(context, "copies", len(rounds))
    own: dict[int, Tensor] = {}
    for done, first in enumerate(rounds, start=1):
        index = first + world.rank
        for place, hidden_TC in enumerate(hidden.pop(index, ())):
            outputs = normed_outputs(head, hidden_TC[None].to(world.device))
            window = index * size + place
            own[window] = redrawn_copies(windows_ST[window], outputs, context.params.refit_copies, window=window).int()
        after_each(done)
    copies = {window: copies_RT for share in world.all_gather(own) for window, copies_RT in share.items()}
    return torch.stack([copies[window] for window in range(len(windows_ST))])


def in_refit_order(windows_ST: Tensor, copies_SRT: Tensor, micro_batch_size: int) -> Tensor:
    """Windows and copies in an order in which refits hold out those windows that they would hold out without copies,
    and all copies of them, as far as there is room; otherwise a refit would be judged on what it was fitted to.

    Args:
        copies_SRT: copies of all windows [windows, copies of each, tokens].
    """
    everything_SRT = torch.cat([windows_ST[:, None], copies_SRT], dim=1)
    versions, apart = everything_SRT.shape[1], windows_held_out(len(windows_ST), micro_batch_size)
    # Windows in order, each with its copies: where there is no room, or too much, few windows are on both sides.
    held_out, fitted = (
        [window * versions + it for window, is_apart in enumerate(apart) if is_apart is side for it in range(versions)]
        for side in (True, False)
    )
    order = []
    for is_apart in windows_held_out(everything_SRT[..., 0].numel(), micro_batch_size):
        first, second = (held_out, fitted) if is_apart else (fitted, held_out)
        order.append(first.pop(0) if first else second.pop())
    return everything_SRT.flatten(0, 1)[order]

"""The refit of what a prune stage writes, on the calibration windows and on copies of them with redrawn tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.core.redraw import redrawn_copy
from hfprune_dist.data.windows import WINDOWS, load_windows, save_windows
from hfprune_dist.distributed.gram_sums import is_held_out
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.measurement import normed_outputs
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages.prune_refit import Context, Models, outputs_of_dense, pruned_kinds, refit_layers
from hfprune_dist.structures.kept import Kept


def final_refit(context: Context, models: Models, kept: Kept) -> RefittedLayers:
    """Refit what the stage will write, as its settings say; collective."""
    kinds, whole_mlp = pruned_kinds(context, models.checkpoint), context.params.refit == "block"
    fitted = RefittedLayers(models.checkpoint, kinds, whole_mlp, context.work / "refit")
    refit_layers(context, models, kept, _windows(context, models.dense), fitted, phase="refit")
    return fitted


def _windows(context: Context, dense: Checkpoint) -> Tensor:
    """The calibration windows, and ``refit_copies`` of each, int64 [windows, sequence_length].

    Copies are the dense model's work, the same in every round. Ranks share it, and rank 0 saves it for later attempts.
    """
    windows_ST, copies = context.calibration_windows(), context.params.refit_copies
    if not copies:
        return windows_ST
    saved = context.work / "copies"
    if not context.let_first_work(lambda: is_usable(saved / WINDOWS)):
        redrawn_RST = _redrawn(context, dense, windows_ST)

        def save() -> None:
            saved.mkdir(parents=True, exist_ok=True)
            save_windows(redrawn_RST.flatten(0, 1), saved)

        context.let_first_work(save)
    copies_RST = load_windows(saved).view(copies, *windows_ST.shape)
    return in_refit_order(windows_ST, copies_RST, context.params.forward_pass()[1])


def in_refit_order(windows_ST: Tensor, copies_RST: Tensor, micro_batch_size: int) -> Tensor:
    """Windows and copies in an order in which refits hold out the copies of those windows that they would hold out
    without copies, as far as there is room; otherwise a refit would be judged on much of what it was fitted to.

    Args:
        copies_RST: copies of all windows [copies of each, windows, tokens].
    """
    everything_ST = torch.cat([windows_ST, *copies_RST])
    apart = _held_out(len(windows_ST), micro_batch_size) * (1 + len(copies_RST))
    held_out, fitted = ([it for it, is_apart in enumerate(apart) if is_apart is wanted] for wanted in (True, False))
    order = []
    for is_apart in _held_out(len(everything_ST), micro_batch_size):
        first, second = (held_out, fitted) if is_apart else (fitted, held_out)
        order.append(first.pop(0) if first else second.pop())  # where there is no room, copies give way
    return everything_ST[order]


def _held_out(windows: int, micro_batch_size: int) -> list[bool]:
    """For each window, whether refits hold it out."""
    batches = -(-windows // micro_batch_size)
    return [is_held_out(window // micro_batch_size, batches) for window in range(windows)]


def _redrawn(context: Context, dense: Checkpoint, windows_ST: Tensor) -> Tensor:
    """Copies of all windows, int64 [copies of each, windows, tokens], on every rank."""
    (name, size), world = context.params.forward_pass(), context.world
    hidden = outputs_of_dense(context, dense, dict(enumerate(windows_ST.split(size))))
    head = LayerReader(dense, getattr(torch, name), world.device).head()
    own: dict[tuple[int, int], Tensor] = {}
    for index, hidden_BTC in hidden.items():
        for window, hidden_TC in enumerate(hidden_BTC.to(world.device), start=index * size):
            outputs = normed_outputs(head, hidden_TC[None])
            for copy in range(context.params.refit_copies):
                own[copy, window] = redrawn_copy(windows_ST[window], outputs, window=window, copy=copy)
    return torch.stack([*world.merge(own).values()]).view(-1, *windows_ST.shape)

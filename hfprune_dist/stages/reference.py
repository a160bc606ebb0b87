"""Reference: what the dense model makes of a text. Evaluations compare with it, distillations learn from it."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.data.windows import read_windows
from hfprune_dist.models.checkpoint import open_checkpoint
from hfprune_dist.models.tokenizer import load_tokenizer
from hfprune_dist.parallel.dense_states import write_dense_states
from hfprune_dist.stages.context import Context

SEED = 0


def run(context: Context) -> None:
    """Write the windows and the dense model's final hidden states (``DenseStates``).

    Not interrupted: it is a forward, of which nothing would be saved.
    """
    dense = open_checkpoint(context.input_path("model"))
    windows_ST = context.calibration_windows() if context.has_input("importance") else held_out_windows(context)
    draft = context.open_draft()
    write_dense_states(
        dense,
        windows_ST,
        getattr(torch, context.params["dtype"]),
        context.params["micro_batch_size"],
        draft,
        context.world,
        lambda done: context.progress.update("layers", done, dense.num_layers),
    )
    context.commit(draft, {"windows": len(windows_ST), "tokens": windows_ST.numel()})


def held_out_windows(context: Context) -> Tensor:
    """Windows [windows, sequence_length] of the held-out text, cut on rank 0."""
    if not context.world.is_first:
        return context.world.broadcast(torch.empty(0))
    settings = context.params["text"]
    path = context.input_path("text") if context.has_input("text") else None
    tokenizer = load_tokenizer(context.input_path("model"))
    windows = read_windows(
        settings, path, tokenizer, context.params["add_bos_token"], settings["windows"], SEED, "fidelity"
    )
    return context.world.broadcast(windows.input_ids_ST)

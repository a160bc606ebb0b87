"""Reference: the dense model's final hidden states on a text, which evaluations and distillations compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.data.tokenizer import load_tokenizer
from hfprune_dist.data.windows import Sampling, read_windows
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.kinds.reference import ReferenceParameters
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.training.teacher_states import write_dense_states

Context = AnyContext[ReferenceParameters]

# Of the choice of windows: the same for every seed of a sweep, so that rows of several seeds can be compared.
SEED = 0


def run(context: Context) -> None:
    """Write the windows and the dense model's final hidden states (``DenseStates``)."""
    dense = open_checkpoint(context.input_path("model"))
    windows_ST = context.calibration_windows() if context.has_input("importance") else held_out_windows(context)
    stream = _stream(context, dense, windows_ST)
    draft = context.open_draft()

    def after_each(done: int) -> None:
        context.progress.update("layers", done, dense.num_layers)
        context.interruption.stop_if_agreed(context.world)

    write_dense_states(stream, draft, context.world, after_each)
    context.commit(draft, {"windows": len(windows_ST), "tokens": windows_ST.numel()})


def _stream(context: Context, dense: Checkpoint, windows_ST: Tensor) -> LayerStream:
    """Stream of windows before the first layer."""
    params = context.params
    context.check_layers(dense, windows_ST, params.dtype)
    return LayerStream(dense, windows_ST, getattr(torch, params.dtype), params.micro_batch_size, context.world)


def held_out_windows(context: Context) -> Tensor:
    """Windows [windows, sequence_length] of the held-out text, cut on rank 0."""
    return context.world.on_rank0(lambda: _cut_windows(context))


def _cut_windows(context: Context) -> Tensor:
    settings, add_bos_token = context.params.text, context.params.add_bos_token
    assert settings is not None and add_bos_token is not None, "planned on the windows of an importance stage"
    path = context.input_path("text") if context.has_input("text") else None
    tokenizer = load_tokenizer(context.input_path("model"))
    sampling = Sampling(settings.windows, settings.sequence_length, SEED, add_bos_token)
    windows = read_windows(settings.model_dump(), path, tokenizer, sampling, "fidelity")
    return windows.input_ids_ST

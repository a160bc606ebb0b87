"""Reference: the dense model's final hidden states on a text, which evaluations and distillations compare with."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
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
    if context.has_input("importance"):
        windows_ST = context.calibration_windows()
    else:
        windows_ST = context.world.on_rank0(lambda: _held_out_windows(context))
    params, world = context.params, context.world
    context.check_layers(dense, windows_ST, params.dtype)
    at_once, stay = context.passes(partial(params.passes_over, dense), "auto", windows_ST)
    context.decided["micro_batch_size"] = at_once
    stream = LayerStream(dense, windows_ST, getattr(torch, params.dtype), at_once, world, stay=stay)
    draft = context.open_draft()
    write_dense_states(stream, draft, context.reporting("layers", dense.num_layers))
    context.commit(draft, {"windows": len(windows_ST), "tokens": windows_ST.numel()})


def _held_out_windows(context: Context) -> Tensor:
    """Windows [windows, sequence_length] of the held-out text."""
    settings, add_bos_token = context.params.text, context.params.add_bos_token
    assert settings is not None and add_bos_token is not None, "planned on the windows of an importance stage"
    tokenizer = load_tokenizer(context.input_path("model"))
    sampling = Sampling(settings.windows, settings.sequence_length, SEED, add_bos_token)
    return read_windows(settings.model_dump(), context.input_if_any("text"), tokenizer, sampling, "fidelity")

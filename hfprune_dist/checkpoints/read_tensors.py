"""Weights of a checkpoint, read from its files one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.stored_names import Sources
from hfprune_dist.core.criterion import ScoredLayer
from hfprune_dist.errors import UserError
from hfprune_dist.structures.layout import Dimension
from hfprune_dist.structures.units import Units

# torch's dtypes, by their names in safetensors files.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# Name of a tensor in the model -> the tensor, in the dtype of the file, on the CPU.
Read = Callable[[str], Tensor]


@contextmanager
def open_weights(checkpoint: Checkpoint) -> Iterator[Read]:
    """Yield a function that reads a checkpoint's tensors; files that it needs stay open, since opening takes longer."""
    with ExitStack() as files:
        opened: dict[str, Any] = {}

        def read(name: str) -> Tensor:
            file = checkpoint.tensors[name].file
            if file not in opened:
                opened[file] = files.enter_context(safe_open(checkpoint.path / file, framework="pt"))
            tensor: Tensor = opened[file].get_tensor(checkpoint.names.in_files(name))
            return tensor

        yield read


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read one tensor, in the dtype of the file, on the CPU."""
    with open_weights(checkpoint) as read:
        return read(name)


def read_module_tensor(read: Read, sources: Sources) -> Tensor:
    """Read a tensor of a module, in the dtype of the files, on the CPU."""
    matrices = [[read(name) for name in names] for names in sources]
    whole = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in matrices]
    return torch.stack(whole) if len(whole) > 1 else whole[0]


def scored_layer(
    checkpoint: Checkpoint,
    units: Units,
    layer: int,
    seed: int,
    tokens: int = 0,
    *,
    moments: tuple[Tensor, Tensor] | None = None,
    read_gradient: Callable[[str], Tensor] | None = None,
) -> ScoredLayer:
    """A layer's units of one kind, as criteria see them; ``tokens`` is how many its sums run over, ``moments`` are its
    Gram matrix and curvature, and ``read_gradient`` reads a whole weight's gradient, given its name within a layer.
    """
    gram_DD, curvature_CC = moments or (None, None)
    owner = checkpoint.units if units.experts > 1 else units  # of whole experts, what their neurons own
    return ScoredLayer(
        number=layer,
        units=units.counts[layer],
        kind=units.kind,
        seed=seed,
        read_rows=lambda: _weights(checkpoint, owner, layer, owner.owned[:-1]),
        read_columns=lambda: _weights(checkpoint, owner, layer, owner.owned[-1:])[0].T,
        tokens=tokens,
        gram_DD=gram_DD,
        curvature_CC=curvature_CC,
        read_gradients=_gradients(units, read_gradient) if read_gradient else (),
    )


def _weights(
    checkpoint: Checkpoint, units: Units, layer: int, owned: Sequence[tuple[str, int, Dimension]]
) -> list[Tensor]:
    """What units own of a layer's weights, whatever the form of the files: for each weight, or part of one, a matrix
    [units * entries of a unit, other dimension], with one expert after another.
    """
    matrices: list[Tensor] = []
    for pattern, place, each in owned:
        if "bias" not in pattern:
            name, experts = units.tensor(layer, pattern), range(units.experts if "{}" in pattern else 1)
            of_experts = [read_tensor(checkpoint, name.format(expert)) for expert in experts]
            if of_experts[0].ndim == 2:
                matrices += torch.cat([matrix.movedim(place, 0) for matrix in of_experts]).chunk(each.stretches)
            else:
                whole = of_experts[0].movedim(place, 1)
                matrices += [part.flatten(0, 1) for part in whole.chunk(each.stretches, dim=1)]
    return matrices


def _gradients(units: Units, read: Callable[[str], Tensor]) -> list[Callable[[], Tensor]]:
    """Gradients of the weights that a layer's units own, divided into parts as the weights themselves."""
    *rows, columns = units.weights
    counted = zip(rows, units.row_parts, strict=True)

    def part_of(name: str, part: int, parts: int) -> Tensor:
        return read(name).chunk(parts)[part]

    of_parts = [partial(part_of, name, part, parts) for name, parts in counted for part in range(parts)]
    return [*of_parts, partial(read, columns)]


def as_stored(checkpoint: Checkpoint, name: str, tensor: Tensor, *, like: str | None = None, otherwise: str) -> Tensor:
    """Round a tensor, of any shape and on any device, to the dtype that the tensor ``like`` (None: ``name``) has in the
    checkpoint's files. Values that are too large for float16, the one dtype whose range is easily left, are refused
    unless they were infinite before.

    Args:
        name: under which it will be written.
        otherwise: what the user can do instead of converting the model, for the message.
    """
    rounded = tensor.to(DTYPES[checkpoint.tensors[like or name].dtype])
    if rounded.dtype == torch.float16 and tensor.dtype != torch.float16:
        too_large = rounded.isinf() & tensor.isfinite()
        if too_large.any():
            largest, limit = float(tensor[too_large].abs().max()), torch.finfo(torch.float16).max
            raise UserError(
                f"{checkpoint.path}: the new {name} has values up to {largest:,.0f}, but float16, its dtype in this "
                f"checkpoint, ends at {limit:,.0f}; convert the dense model to bfloat16 (transformers' from_pretrained "
                f"with dtype=torch.bfloat16, then save_pretrained) and prune the result, or {otherwise}"
            )
    return rounded

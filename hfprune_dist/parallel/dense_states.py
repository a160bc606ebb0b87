"""What the dense model makes of the calibration windows, on disk for the ranks that train a pruned one.

Windows walk through the dense model layer by layer, so that it is never loaded as a whole, and never with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfprune_dist.files import fsync_path
from hfprune_dist.models.checkpoint import Checkpoint, is_whole
from hfprune_dist.parallel.layerwise import LayerStream
from hfprune_dist.parallel.world import World

DENSE = "dense"


class DenseStates:
    """Calibration windows with the dense model's final hidden states, as rows to train on; a ``RowReader``.

    A row has int64 ``input_ids`` and ``labels`` [sequence_length], and ``dense`` [sequence_length, hidden_size].

    Args:
        windows_ST: all calibration windows, int64 [samples, sequence_length].
        micro_batch_size: windows per file.
        folder: gets a file for every micro-batch, which one rank writes and all read.
    """

    def __init__(self, windows_ST: Tensor, micro_batch_size: int, folder: Path) -> None:
        self._windows_ST = windows_ST
        self._micro_batch_size = micro_batch_size
        self._folder = folder

    def __call__(self, row: int) -> dict[str, Tensor]:
        file, place = divmod(row, self._micro_batch_size)
        with safe_open(self._file(file), framework="pt") as stream:
            dense_TC = stream.get_slice(DENSE)[place]
        return {"input_ids": self._windows_ST[row], "labels": self._windows_ST[row].clone(), DENSE: dense_TC}

    def write(
        self, checkpoint: Checkpoint, dtype: torch.dtype, world: World, after_each: Callable[[int], None]
    ) -> None:
        """Run the dense model, unless an earlier attempt came to its end; an attempt in the middle begins anew.

        Args:
            checkpoint: the dense model.
            after_each: called on every rank with the number of layers that are done.
        """
        if world.broadcast(world.is_first and self._is_complete()):
            return
        if world.is_first:
            self._folder.mkdir(exist_ok=True)
        stream = LayerStream(checkpoint, self._windows_ST, dtype, self._micro_batch_size, world)
        for number in range(checkpoint.num_layers):
            stream.advance(stream.layer(number))
            world.barrier()  # ranks with fewer windows wait here, never for longer than a layer
            after_each(number + 1)
        for index, hidden_BTC in stream.final_hidden():
            draft = self._file(index).with_suffix(".draft")
            save_file({DENSE: hidden_BTC.contiguous()}, draft)
            fsync_path(draft)
            draft.replace(self._file(index))
        world.barrier()

    def _is_complete(self) -> bool:
        files = -(-len(self._windows_ST) // self._micro_batch_size)
        return all(is_whole(self._file(index)) for index in range(files))

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:06d}.safetensors"

"""The dense model's final hidden states on windows of text, on disk for all stages that compare with them.

<folder>/windows.safetensors     input_ids, int64 [windows, sequence_length]
<folder>/<number>.safetensors    final hidden states of a micro-batch [its windows, sequence_length, hidden_size]
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfprune_dist.data.windows import load_windows, save_windows
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.errors import UserError, naming

DENSE = "dense"


class DenseStates:
    """Windows with the dense model's final hidden states, read one at a time; a ``RowReader`` for training.

    Attributes:
        windows_ST: int64 [windows, sequence_length].
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.windows_ST = load_windows(folder)
        with safe_open(_file(folder, 0), framework="pt") as first:
            self._per_file: int = first.get_slice(DENSE).get_shape()[0]

    def hidden(self, index: int) -> Tensor:
        """What the dense model's head reads for one window [sequence_length, hidden_size]."""
        number, place = divmod(index, self._per_file)
        with safe_open(_file(self._folder, number), framework="pt") as stream:
            hidden_TC: Tensor = stream.get_slice(DENSE)[place]
        return hidden_TC

    def __call__(self, row: int) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, int64 [sequence_length], and ``dense`` [sequence_length, hidden_size]."""
        input_ids_T = self.windows_ST[row]
        return {"input_ids": input_ids_T, "labels": input_ids_T.clone(), DENSE: self.hidden(row)}


def write_dense_states(stream: LayerStream, folder: Path, after_each: AfterLayer) -> None:
    """Take windows through a model layer by layer, so that it is never loaded whole, and write their final states.

    Args:
        stream: the windows before the first layer; every rank has some.

    Raises:
        UserError: if the states are NaN or infinite, since nothing can be compared with them.
    """
    stream.world.on_rank0(lambda: save_windows(stream.windows_ST, folder))
    stream.run_layers(after_each)
    is_finite = True
    for index, hidden_BTC in stream.final_hidden():
        with naming(file := _file(folder, index)):
            save_file({DENSE: hidden_BTC.contiguous()}, file)
        is_finite = is_finite and bool(hidden_BTC.isfinite().all())
    if not is_finite:
        raise UserError("the dense model's final hidden states are NaN or infinite; check the checkpoint's weights")


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"

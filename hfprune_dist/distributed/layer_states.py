"""Hidden states of micro-batches on their way through the layers, on disk, so that a later attempt can resume.

<folder>/<layers done>.<micro-batch>.safetensors
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import load_usable, save_tensors
from hfprune_dist.distributed.world import World
from hfprune_dist.store.atomic_files import listed

# Measurements save after a layer if their last save was longer ago: small models' layers take less time than saving.
SAVE_EVERY_S = 5.0
# Hidden states by name.
Named = Mapping[str, Tensor]


class LayerStates:
    """The last saved states of all ranks' micro-batches; any number of ranks finds its own among them.

    Args:
        folder: for one pass and nothing else.
        micro_batches: of all ranks; of N ranks, each has every Nth one, beginning with the one at its own number.
    """

    def __init__(self, folder: Path, micro_batches: Sequence[int], world: World) -> None:
        self._folder = folder
        self._all = list(micro_batches)
        self._mine = self._all[world.rank :: world.size]
        self._world = world
        self._saved_at = time.monotonic()

    def newest(self) -> tuple[int, dict[int, Named]]:
        """Number of layers after which all micro-batches were saved, and this rank's states; 0 and none if never.

        Collective. Damaged files are set aside.
        """
        for done in self._world.on_rank0(self._complete):
            usable: dict[int, Named] = {}
            if all(self._world.all_gather(self._read_mine(done, usable))):
                return done, usable
        return 0, {}

    def _read_mine(self, done: int, usable: dict[int, Named]) -> bool:
        """Read this rank's states after some layers, as far as they are usable; return whether all are."""
        read = {index: load_usable(self._file(done, index)) for index in self._mine}
        usable.update({index: named for index, named in read.items() if named is not None})
        return len(usable) == len(read)

    def save(self, done: int, hidden: Mapping[int, Named]) -> None:
        """Save states, and delete older ones once every rank has saved; collective.

        Args:
            hidden: micro-batch of this rank -> its hidden states.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for index, named in hidden.items():
            save_tensors({name: tensor.contiguous() for name, tensor in named.items()}, self._file(done, index))
        self._world.barrier()
        for index in self._mine:
            with suppress(OSError):  # a later save deletes what can't be deleted now
                for file in listed(self._folder, f"*.{index}.safetensors"):
                    if file != self._file(done, index):
                        file.unlink()
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether the last save, or the beginning of the pass, was so long ago that it is time for another; collective,
        and the first rank's clock decides.
        """
        return self._world.broadcast(time.monotonic() - self._saved_at >= SAVE_EVERY_S)

    def discard(self) -> None:
        """Delete the states of the pass, which is over; collective."""
        self._world.barrier()
        if self._world.is_first:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _complete(self) -> list[int]:
        """Numbers of layers after which there is a file for every micro-batch, the largest first."""
        found: dict[int, set[int]] = {}
        for file in listed(self._folder, "*.*.safetensors"):
            done, index = file.name.split(".")[:2]
            found.setdefault(int(done), set()).add(int(index))
        return sorted((done for done, indices in found.items() if indices >= set(self._all)), reverse=True)

    def _file(self, done: int, index: int) -> Path:
        return self._folder / f"{done}.{index}.safetensors"

"""Second moments of the gradients at output projections' outputs, summed over all ranks where they appear.

They are too large to travel shard by shard, or to lie on one host: of Llama-2-70B 22 GB. So each layer's are rounded to
integers in the backward that makes them, added over all ranks on their device, and kept by the rank that owns the
layer, which also saves them. One layer's matrix is alive at a time besides what a rank owns. Integers travel, and are
kept, without what is below the diagonal (``core.triangle``).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, load_tensors, save_tensors
from hfprune_dist.core.exact_sums import OUT_OF_RANGE, ExactOverflowError, GramScale
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.triangle import packed_size
from hfprune_dist.core.unit_sums import SeeOutputGradients
from hfprune_dist.distributed.world import World

TOTAL = "total"


class CurvatureSums:
    """The sum of g g^T over tokens, of every layer, g the gradient at the output of its output projection of one kind.

    Args:
        shape: (num_layers, hidden_size) of the model.
        micro_batches: of the whole pass.
    """

    def __init__(self, shape: tuple[int, int], micro_batches: int, world: World) -> None:
        self._num_layers, self._hidden_size = shape
        self._micro_batches = micro_batches
        self._world = world
        self._first: dict[int, Tensor] = {}
        self._scales: dict[int, GramScale] = {}
        self._totals: dict[int, Tensor] = {}
        self._fits = torch.ones((), dtype=torch.bool, device=world.device)

    @property
    def owned_bytes(self) -> int:
        """The most that any rank owns, in bytes."""
        return -(-self._num_layers // self._world.size) * packed_size(self._hidden_size) * torch.int64.itemsize

    def add(self, layer: int, gradients_NC: Tensor, *, counts: bool) -> None:
        """Add a micro-batch's gradients at a layer, of all ranks together, this rank's if they count. Collective.

        The first ones of rank 0, which must count, decide the layer's scale. ``fits`` tells whether all could be added.
        """
        term_CC = None
        if counts:
            term_CC = gram_matrix(gradients_NC.to(torch.promote_types(gradients_NC.dtype, torch.float32)))
        scale = self._scales.get(layer) or self._begin(layer, term_CC)
        owner = layer % self._world.size
        if term_CC is not None:
            self._fits &= scale.holds(term_CC)
        if self._world.size == 1:
            if term_CC is not None:
                scale.add_packed(term_CC, self._total(layer))
            return
        sum_P = self._nothing()
        if term_CC is not None:
            scale.add_packed(term_CC, sum_P)
        del term_CC  # a collective may need as much for itself
        self._world.add_up_on(sum_P, owner)
        if owner == self._world.rank:
            self._total(layer).add_(sum_P)

    def fits(self) -> bool:
        """Whether none of this rank's gradients was out of all proportion."""
        return bool(self._fits)

    def first(self) -> Tensor:
        """What decides the layers' scales: float64 [num_layers, hidden_size]."""
        return torch.stack([self._first[layer].cpu() for layer in range(self._num_layers)])

    def save(self, prefix: Path) -> None:
        """Write the totals of this rank's layers, a file each, whose names begin with ``prefix``."""
        for layer in self._owned():
            save_tensors({TOTAL: self._total(layer).cpu()}, _file(prefix, layer))

    def resume(self, first_LC: Tensor, prefix: Path) -> None:
        """Go on from what ranks saved, however many there were.

        Args:
            first_LC: what ``first`` told.

        Raises:
            DamagedFileError: where a file of this rank's layers is missing or can't be used.
        """
        self._first = {layer: first_C.to(self._world.device) for layer, first_C in enumerate(first_LC)}
        self._scales = {layer: GramScale(it, self._micro_batches) for layer, it in self._first.items()}
        self._totals = {layer: self._read(prefix, layer) for layer in self._owned()}

    def release(self) -> None:
        """Let go of the totals, once they are saved for good."""
        self._totals = {}

    def begin_anew(self) -> None:
        """As if nothing had been added, or resumed."""
        self._first, self._scales, self._totals = {}, {}, {}

    def value(self, layer: int, prefix: Path) -> Tensor:
        """The saved sum of any layer, float64 [hidden_size, hidden_size] on the device."""
        return self._scales[layer].value_of_packed(self._read(prefix, layer))

    def _owned(self) -> Sequence[int]:
        return range(self._world.rank, self._num_layers, self._world.size)

    def _begin(self, layer: int, term_CC: Tensor | None) -> GramScale:
        first_C = torch.zeros(self._hidden_size, dtype=torch.float64, device=self._world.device)
        if term_CC is not None:
            first_C += term_CC.diagonal()
        self._world.broadcast_tensor(first_C, 0)
        self._first[layer] = first_C
        self._scales[layer] = GramScale(first_C, self._micro_batches)
        return self._scales[layer]

    def _total(self, layer: int) -> Tensor:
        if layer not in self._totals:
            self._totals[layer] = self._nothing()
        return self._totals[layer]

    def _nothing(self) -> Tensor:
        return torch.zeros(packed_size(self._hidden_size), dtype=torch.int64, device=self._world.device)

    def _read(self, prefix: Path, layer: int) -> Tensor:
        file = _file(prefix, layer)
        if not file.is_file():
            raise DamagedFileError(f"goes with {file.name}, which is missing")
        try:
            tensors, _ = load_tensors(file)
        except DamagedFileError as error:
            raise DamagedFileError(f"goes with {file.name}, which {error}") from None
        total_P = tensors.get(TOTAL, torch.zeros(0))
        if total_P.dtype != torch.int64 or total_P.shape != (packed_size(self._hidden_size),):
            raise DamagedFileError(f"goes with {file.name}, which is of another pass")
        return total_P.to(self._world.device)


class Curvature:
    """The sums of all kinds of units, and their files: in a folder for each state of the pass, which is valid from the
    moment when something else says so; then the one before it can go.

    Args:
        shapes: kind -> (num_layers, hidden_size).
        micro_batches: of the whole pass.
        folder: where folders of states are.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], micro_batches: int, folder: Path, world: World) -> None:
        self._sums = {kind: CurvatureSums(shape, micro_batches, world) for kind, shape in shapes.items()}
        self._folder = folder

    @property
    def owned_bytes(self) -> int:
        """The most that any rank owns, in bytes."""
        return sum(sums.owned_bytes for sums in self._sums.values())

    def seeing(self, *, counts: bool) -> Mapping[str, SeeOutputGradients]:
        """What adds up gradients, of each kind; this rank's if they count."""
        return {kind: partial(sums.add, counts=counts) for kind, sums in self._sums.items()}

    def check(self) -> None:
        """After a micro-batch.

        Raises:
            ExactOverflowError: where gradients of this rank were out of all proportion.
        """
        if not all(sums.fits() for sums in self._sums.values()):
            raise ExactOverflowError(OUT_OF_RANGE)

    def release(self) -> None:
        """Let go of the sums, once they are saved for good."""
        for sums in self._sums.values():
            sums.release()

    def begin_anew(self) -> None:
        """As if nothing had been added, or resumed."""
        for sums in self._sums.values():
            sums.begin_anew()

    def first(self) -> dict[str, Tensor]:
        """What decides scales: kind -> float64 [num_layers, hidden_size]."""
        return {kind: sums.first() for kind, sums in self._sums.items()}

    def save(self, shards: int) -> None:
        """Write what this rank owns, after so many shards."""
        self._of(shards).mkdir(parents=True, exist_ok=True)
        for kind, sums in self._sums.items():
            sums.save(self._of(shards) / kind)

    def resume(self, first: Mapping[str, Tensor], shards: int) -> str:
        """Read what this rank owns; returns what is wrong with it, empty where nothing is."""
        try:
            for kind, sums in self._sums.items():
                sums.resume(first[kind], self._of(shards) / kind)
        except DamagedFileError as error:
            return str(error)
        return ""

    def value(self, kind: str, layer: int, shards: int) -> Tensor:
        """The sum of any layer after so many shards, float64 [hidden_size, hidden_size] on the device."""
        return self._sums[kind].value(layer, self._of(shards) / kind)

    def keep_only(self, shards: int) -> None:
        """Remove what was saved after any other number of shards."""
        for folder in self._folder.iterdir():
            if folder != self._of(shards):
                shutil.rmtree(folder)

    def _of(self, shards: int) -> Path:
        return self._folder / str(shards)


def _file(prefix: Path, layer: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{layer}.safetensors")

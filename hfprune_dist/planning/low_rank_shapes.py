"""Shapes whose attention has matrices of low rank, as LoRAP chooses them; every layer has the same.

Attention and MLPs keep the same share of the decoder's matrices. Of attention's parameters that stay, ``SPLIT`` parts
go to v and o, and one part to q and k. Both matrices of such a pair keep the same share of their parameters, and ranks
are rounded down. A pair whose part is at least its full size stays as it is and passes the rest on. Neurons make up
for what rounding leaves of the ratio.

For a model without grouped queries, these are the ranks of LoRAP's code, except for one or two where it rounds twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hfprune_dist.errors import UserError
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.widths import closest_multiple, round_down
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Shape

# Ratio of the parameters of v and o to those of q and k.
SPLIT = 3


@dataclass(frozen=True)
class LowRankTarget:
    """The shape wanted where attention gets matrices of low rank.

    Attributes:
        asked: the ratio, for a model whose layers are alike.
    """

    asked: ShapeTarget

    def shape(self) -> Shape:
        """The shape whose parameters come as close to the ratio as widths allow.

        Raises:
            UserError: if no shape reaches the ratio, or rounding leaves nothing to remove.
        """
        asked, largest = self.asked, self.largest()
        if asked.ratio > largest:
            raise UserError(
                f"{asked.where}: ratio {asked.ratio:g} can't be reached with attention of low rank; the largest "
                f"possible is {round_down(largest):.4f}{asked.rounding}"
            )
        shape = self._with_ranks(self._kept_share)
        if asked.counts.of(shape) == asked.counts.total:
            raise asked.removes_nothing()
        return shape

    def largest(self) -> float:
        """The ratio at which every rank is 1 and widths are the narrowest, whatever ratio is asked for."""
        everything = replace(self, asked=replace(self.asked, ratio=1.0))
        return self.asked.counts.ratio(everything._with_ranks(0.0))

    @property
    def _wanted(self) -> float:
        """Parameters to remove."""
        return self.asked.ratio * self.asked.counts.total

    @property
    def _kept_share(self) -> float:
        """The share of the decoder's matrices that stays."""
        checkpoint = self.asked.checkpoint
        layers = f"{checkpoint.family.layers}."
        shapes = [it.shape for name, it in checkpoint.tensors.items() if name.startswith(layers)]
        matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        return max(0.0, 1 - self._wanted / matrices)

    def _with_ranks(self, share: float) -> Shape:
        """The shape in which this share of attention stays, with the width that makes up the rest."""
        asked, layers = self.asked, range(self.asked.checkpoint.num_layers)
        ranks = {name: (rank,) * len(layers) for name, rank in self._ranks(share).items()}
        whole = Shape(tuple(layers), ranks=ranks)
        left = self._wanted - (asked.counts.total - asked.counts.of(whole))
        most = asked.neurons.most
        exact = most - left / (len(layers) * asked.counts.units[NEURONS])
        width = closest_multiple(exact, most, asked.multiple_of)
        return replace(whole, units={NEURONS: (width,) * len(layers)})

    def _ranks(self, share: float) -> dict[str, int]:
        """Name within a layer of each projection that gets a low rank -> that rank."""
        query, key, value, output = self.asked.checkpoint.family.attention_modules
        sizes = {name: self._matrix(name) for name in (query, key, value, output)}
        pairs = (value, output), (query, key)
        whole = [sum(math.prod(sizes[name]) for name in pair) for pair in pairs]
        budget = share * sum(whole)
        first = min(budget * SPLIT / (1 + SPLIT), whole[0])
        shares = first / whole[0], (budget - first) / whole[1]
        kept = {name: of_pair for pair, of_pair in zip(pairs, shares, strict=True) for name in pair}
        ranks = {name: _rank(sizes[name], kept[name]) for name in sizes}
        return {name: rank for name, rank in ranks.items() if rank is not None}

    def _matrix(self, projection: str) -> tuple[int, int]:
        checkpoint = self.asked.checkpoint
        outputs, inputs = checkpoint.tensors[checkpoint.units.tensor(0, f"{projection}.weight")].shape
        return outputs, inputs


def _rank(size: tuple[int, int], share: float) -> int | None:
    """The rank of factors that have this share of a matrix's parameters; None if the matrix stays as it is."""
    rank = max(1, int(share * math.prod(size) / sum(size)))
    return rank if share < 1 and rank * sum(size) < math.prod(size) else None

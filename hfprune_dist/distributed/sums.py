"""Sums over the micro-batches of all ranks, in float64; Gram matrices for fits that hold micro-batches out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.gram import UnresolvedError, gram_matrix
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError

# One micro-batch in this many is held out from fits, to choose their ridge.
HOLD_OUT_EVERY = 8


class UnusableActivationsError(UserError):
    """A layer's activations are NaN or infinite, or too many of them are rounding errors to fit anything to them.

    Args:
        number: the layer's.
        problem: what is wrong with its activations.
    """

    def __init__(self, number: int, problem: object) -> None:
        super().__init__(f"activations of layer {number}: {problem}; check the checkpoint's weights")


@contextmanager
def explaining(number: int) -> Iterator[None]:
    """Name a layer whose Gram matrices are mostly rounding errors.

    Raises:
        UnusableActivationsError: instead of ``UnresolvedError``.
    """
    try:
        yield
    except UnresolvedError as error:
        raise UnusableActivationsError(number, error) from None


class Float64Sum:
    """A sum that each rank adds up over its own micro-batches, and that is then added up over all ranks, once.

    It has the same bits whenever the number of ranks is the same; with another number, it differs by rounding. Where a
    term is NaN or infinite, so is the sum.

    Args:
        number: of the layer whose activations are summed, for messages.
    """

    def __init__(self, number: int, shape: Sequence[int], world: World) -> None:
        self._number = number
        self._world = world
        self._sum = torch.zeros(shape, dtype=torch.float64, device=world.device)

    def add(self, term: Tensor) -> None:
        """Add a micro-batch's term, of any dtype."""
        self._sum += term

    def of_all_ranks(self, owner: int | None = None) -> Tensor:
        """Return the sum, float64, on the device; collective, and nothing can be added afterwards.

        Args:
            owner: the only rank that needs it; on others, what is returned means nothing. None if all do.

        Raises:
            UnusableActivationsError: on each rank that needs it, if it is NaN or infinite.
        """
        if owner is None:
            self._world.all_reduce(self._sum)
        elif self._world.size > 1:
            self._world.reduce(self._sum, owner)
        if owner in (None, self._world.rank) and not self._sum.sum().isfinite():
            raise UnusableActivationsError(self._number, "values are NaN or infinite")
        return self._sum


def is_held_out(index: int, count: int) -> bool:
    """Whether the micro-batch ``index``, one of ``count``, is held out rather than fitted."""
    every = min(HOLD_OUT_EVERY, count)
    return count > 1 and index % every == every - 1


def windows_held_out(windows: int, micro_batch_size: int) -> list[bool]:
    """For each window, whether its micro-batch is held out rather than fitted."""
    batches = -(-windows // micro_batch_size)
    return [is_held_out(window // micro_batch_size, batches) for window in range(windows)]


@dataclass(frozen=True)
class Split:
    """The split of all ranks' micro-batches: how many there are, and tokens in all of them and in those held out."""

    count: int
    tokens: int
    held_out_tokens: int

    @classmethod
    def of(cls, batches: Sequence[Tensor]) -> Split:
        """The split of micro-batches of ids [windows, tokens]."""
        sizes, count = [it.numel() for it in batches], len(batches)
        return cls(count, sum(sizes), sum(size for index, size in enumerate(sizes) if is_held_out(index, count)))

    @property
    def fitted_tokens(self) -> int:
        """Number of tokens that are not held out; if there is only one micro-batch, it is both."""
        return self.tokens - self.held_out_tokens


@dataclass(frozen=True)
class Grams:
    """Mean of h h^T over tokens: float64, on the device, on every rank; h is a layer's activations, or other vectors.

    Attributes:
        fitted_DD: over the micro-batches that are fitted.
        held_out_DD: over those that are held out.
        held_out_share: the share of all tokens that is held out.
    """

    fitted_DD: Tensor
    held_out_DD: Tensor
    held_out_share: float

    def to(self, device: torch.device) -> Grams:
        """The same matrices on a device."""
        return Grams(self.fitted_DD.to(device), self.held_out_DD.to(device), self.held_out_share)

    def whole(self) -> Tensor:
        """The mean over all micro-batches, a new matrix that is as large as either of them."""
        return self.fitted_DD.lerp(self.held_out_DD, self.held_out_share)


class GramSums:
    """Sums of v v^T over fitted and over held-out micro-batches: float32 products of one, added up in float64.

    Args:
        number: of the layer whose activations are summed, for messages.
        size: length of a vector v; there is one for each token.
    """

    def __init__(self, number: int, size: int, split: Split, world: World) -> None:
        self._fitted, self._held_out = (Float64Sum(number, (size, size), world) for _ in range(2))
        self._split = split

    def add(self, index: int, vectors_ND: Tensor) -> None:
        """Add a micro-batch's vectors [tokens, size]; there may be none."""
        if len(vectors_ND):
            (self._held_out if is_held_out(index, self._split.count) else self._fitted).add(gram_matrix(vectors_ND))

    def means(self, owner: int | None = None) -> Grams:
        """Return means over the tokens of all ranks; collective, see ``Float64Sum.of_all_ranks``."""
        fitted_DD = self._fitted.of_all_ranks(owner).div_(self._split.fitted_tokens)
        if not self._split.held_out_tokens:
            return Grams(fitted_DD, fitted_DD, 0.0)
        held_out_DD = self._held_out.of_all_ranks(owner).div_(self._split.held_out_tokens)
        return Grams(fitted_DD, held_out_DD, self._split.held_out_tokens / self._split.tokens)

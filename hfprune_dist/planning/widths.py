"""Conversion between a ratio of parameters and widths, the numbers of units that layers keep.

A ratio is removed parameters / all parameters of the model, as in the paper; it is not the share of units removed (20 %
of Llama-3.2-1B is 31 % of its neurons).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.errors import UserError


class OutOfReachError(UserError):
    """No shape comes to a ratio, as nothing more is left that may be removed.

    Attributes:
        largest: the largest ratio that can be reached, as the message has it.
    """

    def __init__(self, message: str, largest: float) -> None:
        super().__init__(message)
        self.largest = round_down(largest)


@dataclass(frozen=True)
class ModelSize:
    """The numbers that decide which widths a ratio needs.

    Attributes:
        parameters: of the whole model.
        counts: units of each layer.
        parameters_per_unit: the same in every layer.
        kind: what the units are called.
    """

    parameters: int
    counts: tuple[int, ...]
    parameters_per_unit: int
    kind: str

    @property
    def num_layers(self) -> int:
        return len(self.counts)

    @property
    def units(self) -> int:
        """Units of the layer that has the most."""
        return max(self.counts)

    def ratio_of(self, removed: int) -> float:
        """Share of all parameters that is removed with this many units, whatever their layers."""
        return removed * self.parameters_per_unit / self.parameters

    def reached(self, widths: Sequence[int]) -> float:
        """The ratio that is reached if layers keep these numbers of units."""
        return self.ratio_of(self.removed(widths))

    def removed(self, widths: Sequence[int]) -> int:
        """Number of units that are removed if layers keep these numbers."""
        return sum(self.counts) - sum(widths)


def size_of(checkpoint: Checkpoint) -> ModelSize:
    """The numbers of a checkpoint that ratios are computed from."""
    units = checkpoint.units
    return ModelSize(checkpoint.parameters, units.counts, checkpoint.parameters_per_unit, units.kind)


@dataclass(frozen=True)
class Target:
    """A ratio asked of a model, and the widths that come closest to it.

    Attributes:
        ratio: share of the model's parameters to remove.
        multiple_of: widths of layers that lose units are multiples of it.
        where: the model and the method, for messages.
    """

    size: ModelSize
    ratio: float
    multiple_of: int
    where: str

    def uniform_width(self) -> int:
        """Units that each layer keeps so that the ratio is as close to the one asked for as rounding allows. For models
        whose layers all have the same number of units.

        Raises:
            UserError: if removing such units alone can't remove that much, or rounding leaves nothing to remove.
        """
        size, multiple_of = self.size, self.multiple_of
        largest = size.reached([min(multiple_of, size.units)] * size.num_layers)
        if self.ratio > largest:
            raise OutOfReachError(
                f"{self.where}: ratio {self.ratio:g} can't be reached by pruning {size.kind} alone; the largest "
                f"possible is {round_down(largest):.4f}{rounding(multiple_of)}",
                largest,
            )
        width = self.closest_width()
        if width >= size.units:
            raise self._removes_nothing()
        return width

    def closest_width(self) -> int:
        """The same without errors: out of reach, it is the narrowest width or one that removes nothing."""
        size, multiple_of = self.size, self.multiple_of
        exact = size.units - self.ratio * size.parameters / (size.num_layers * size.parameters_per_unit)
        return max(multiple_of, round(exact / multiple_of) * multiple_of)

    def narrowest_widths(self, floor: float, protect_first: int, protect_last: int) -> list[int]:
        """The least width of each layer: the share ``floor`` of its units, or all of them if it is protected."""
        size = self.size
        protected = protected_layers(size.num_layers, protect_first, protect_last)
        rounded = [-(-max(1, round(floor * count)) // self.multiple_of) * self.multiple_of for count in size.counts]
        return [
            count if layer in protected else min(least, count)
            for layer, (least, count) in enumerate(zip(rounded, size.counts, strict=True))
        ]

    def removals(self, narrowest: Sequence[int]) -> int:
        """Units to remove from all layers together so that the ratio is closest to the one asked for.

        Args:
            narrowest: the least width of each layer.

        Raises:
            UserError: if the layers' floors don't allow that many to be removed, or no layer can lose so few.
        """
        size = self.size
        wanted = round(self.ratio * size.parameters / size.parameters_per_unit)
        most = size.removed(narrowest)
        if wanted > most:
            raise OutOfReachError(
                f"{self.where}: ratio {self.ratio:g} can't be reached with the floors that prune.floor, protect_first "
                f"and protect_last set; the largest possible is {round_down(size.ratio_of(most)):.4f}"
                f"{rounding(self.multiple_of)}",
                size.ratio_of(most),
            )
        fewest = min(count - (count - 1) // self.multiple_of * self.multiple_of for count in size.counts)
        if wanted < (fewest + 1) // 2:
            raise self._removes_nothing()
        return wanted

    def _removes_nothing(self) -> UserError:
        return UserError(
            f"{self.where}: ratio {self.ratio:g} removes nothing once widths are rounded"
            f"{to_multiples_of(self.multiple_of)}; use a larger ratio{or_a_smaller(self.multiple_of)}"
        )


def protected_layers(num_layers: int, protect_first: int, protect_last: int) -> set[int]:
    """Indices of the layers that lose nothing: all of them if more are to be protected than there are."""
    layers = range(num_layers)
    return {*layers[:protect_first], *layers[max(num_layers - protect_last, 0) :]}


def closest_multiple(exact: float, width: int, multiple_of: int) -> int:
    """The number of units closest to ``exact`` that a layer may keep: all ``width`` of them, or fewer in a multiple."""
    multiple = max(multiple_of, round(exact / multiple_of) * multiple_of)
    return min((min(multiple, width), width), key=lambda kept: abs(kept - exact))


def rounding(multiple_of: int, tensor_parallel: int = 1) -> str:
    """The settings that units are rounded by, for messages: in parentheses after a space; empty if they are all 1."""
    settings = {"multiple_of": multiple_of, "tensor_parallel": tensor_parallel}
    told = [f"{name} {number}" for name, number in settings.items() if number > 1]
    return f" ({', '.join(told)})" if told else ""


def to_multiples_of(step: int) -> str:
    """The same after a verb: to multiples of 64; empty for 1."""
    return f" to multiples of {step}" if step > 1 else ""


def or_a_smaller(multiple_of: int, tensor_parallel: int = 1) -> str:
    """The end of a sentence that advises another ratio; empty if no smaller multiple is divisible by
    ``tensor_parallel``.
    """
    return " or a smaller prune.multiple_of" if multiple_of > tensor_parallel else ""


def round_down(ratio: float) -> float:
    """A ratio with the four decimals that messages have, rounded down so that it can be reached."""
    return int(ratio * 10000) / 10000

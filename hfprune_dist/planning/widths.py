"""Arithmetic between a parameter ratio and MLP widths.

``total_ratio`` is removed parameters / all parameters of the model, as in the paper; it is not the share of the MLP
that goes (20 % of Llama-3.2-1B is 31 % of its MLP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hfprune_dist.errors import UserError


@dataclass(frozen=True)
class ModelSize:
    """The four numbers that decide which widths a ratio needs."""

    parameters: int
    num_layers: int
    intermediate_size: int
    parameters_per_neuron: int

    def total_ratio(self, width: int) -> float:
        """Share of all parameters that goes when every layer keeps ``width`` neurons."""
        return self.num_layers * (self.intermediate_size - width) * self.parameters_per_neuron / self.parameters

    def largest_ratio(self, multiple_of: int) -> float:
        """The ratio that keeps the fewest neurons a layer may have: ``multiple_of`` of them."""
        return self.total_ratio(min(multiple_of, self.intermediate_size))

    def ratio_of(self, neurons: int) -> float:
        """Share of all parameters that goes with so many neurons, whatever their layers."""
        return neurons * self.parameters_per_neuron / self.parameters


def uniform_width(size: ModelSize, total_ratio: float, multiple_of: int, where: str) -> int:
    """Neurons that each layer keeps so that the reached ratio is as close to ``total_ratio`` as rounding allows.

    Raises:
        UserError: where MLP pruning alone can't remove so much, or rounding leaves nothing to remove.
    """
    largest = size.largest_ratio(multiple_of)
    if total_ratio > largest:
        raise UserError(
            f"{where}: ratio {total_ratio:g} can't be reached by pruning MLPs alone; the largest possible is "
            f"{_round_down(largest)} (multiple_of {multiple_of})"
        )
    exact = size.intermediate_size - total_ratio * size.parameters / (size.num_layers * size.parameters_per_neuron)
    width = max(multiple_of, round(exact / multiple_of) * multiple_of)
    if width >= size.intermediate_size:
        raise _removes_nothing(total_ratio, multiple_of, where)
    return width


def step_ratios(total_ratio: float, steps: int) -> list[float]:
    """The ratios that pruning in equal parts goes through, the last one ``total_ratio`` itself.

    All are of the dense model's parameters. They are rounded to what a person would write, so that a third of 0.3 is
    0.1 and finds the artifact of that ratio.
    """
    return [round(total_ratio * step / steps, 12) for step in range(1, steps)] + [total_ratio]


def uniform_widths(size: ModelSize, total_ratio: float, steps: int, multiple_of: int, where: str) -> list[int]:
    """``uniform_width`` after each of ``step_ratios``.

    Raises:
        UserError: also where a step would remove nothing.
    """
    widths = [uniform_width(size, ratio, multiple_of, where) for ratio in step_ratios(total_ratio, steps)]
    if len(set(widths)) < steps:
        raise UserError(
            f"{where}: of {steps} steps to ratio {total_ratio:g}, one removes nothing once widths are rounded to "
            f"multiples of {multiple_of}; use fewer steps or a smaller prune.multiple_of"
        )
    return widths


def removals(size: ModelSize, total_ratio: float, narrowest: Sequence[int], multiple_of: int, where: str) -> int:
    """Neurons to remove from all layers together so that the reached ratio is closest to ``total_ratio``.

    Args:
        narrowest: the width below which each layer doesn't go.
        multiple_of: widths of layers that lose neurons are multiples of it.

    Raises:
        UserError: where the layers' floors don't let so many go, or a layer can't lose so few.
    """
    wanted = round(total_ratio * size.parameters / size.parameters_per_neuron)
    most = sum(size.intermediate_size - width for width in narrowest)
    if wanted > most:
        raise UserError(
            f"{where}: ratio {total_ratio:g} can't be reached with the floors that prune.floor, protect_first and "
            f"protect_last set; the largest possible is {_round_down(size.ratio_of(most))} (multiple_of {multiple_of})"
        )
    fewest = size.intermediate_size - (size.intermediate_size - 1) // multiple_of * multiple_of
    if wanted < (fewest + 1) // 2:
        raise _removes_nothing(total_ratio, multiple_of, where)
    return wanted


def narrowest_widths(
    size: ModelSize, floor: float, protect_first: int, protect_last: int, multiple_of: int
) -> list[int]:
    """The width below which each layer doesn't go: its share ``floor``, or all of it where it is protected."""
    least = max(1, round(floor * size.intermediate_size))
    least = min(-(-least // multiple_of) * multiple_of, size.intermediate_size)
    protected = {*range(protect_first), *range(size.num_layers - protect_last, size.num_layers)}
    return [size.intermediate_size if layer in protected else least for layer in range(size.num_layers)]


def _removes_nothing(total_ratio: float, multiple_of: int, where: str) -> UserError:
    return UserError(
        f"{where}: ratio {total_ratio:g} removes nothing once widths are rounded to multiples of {multiple_of}; "
        f"use a larger ratio or a smaller prune.multiple_of"
    )


def _round_down(ratio: float) -> str:
    return f"{int(ratio * 10000) / 10000:.4f}"

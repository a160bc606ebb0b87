"""Arithmetic between a parameter ratio and MLP widths.

``total_ratio`` is removed parameters / all parameters of the model, as in the paper; it is not the share of the MLP
that goes (20 % of Llama-3.2-1B is 31 % of its MLP).
"""

from __future__ import annotations

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
        raise UserError(
            f"{where}: ratio {total_ratio:g} removes nothing once widths are rounded to multiples of {multiple_of}; "
            f"use a larger ratio or a smaller prune.multiple_of"
        )
    return width


def _round_down(ratio: float) -> str:
    return f"{int(ratio * 10000) / 10000:.4f}"

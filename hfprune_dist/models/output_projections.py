"""The output projections of a layer: a linear module for each kind of units, or a single module for all experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hfprune_dist.models.experts import down_projections, weighted_activations
from hfprune_dist.models.single_layer import output_of, part_of, read_by
from hfprune_dist.structures.units import Units


def output_weights(layer: nn.Module, units: Units) -> list[Tensor]:
    """Weights [hidden_size, channels] that read the units' channels: one for each expert, or a single one."""
    if units.experts > 1:
        return down_projections(part_of(layer, units.output))
    return [output_of(layer, units).weight.data]


def channels_of(layer: nn.Module, units: Units) -> int:
    """Number of channels that each of ``output_weights`` reads."""
    return output_weights(layer, units)[0].shape[1]


@contextmanager
def channels_read(layer: nn.Module, units: Units) -> Iterator[list[Any]]:
    """Collect the inputs [tokens, channels] of the units' output projection whenever the layer runs; for experts, the
    result of ``weighted_activations``.
    """
    seen: list[Any] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        is_of_experts = units.experts > 1
        seen.append(weighted_activations(module, *inputs) if is_of_experts else read_by(inputs, options).flatten(0, -2))

    handle = part_of(layer, units.output).register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()

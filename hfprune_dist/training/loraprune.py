"""LoRAPrune: units are scored by LoRA's own gradients as a model trains, and masked little by little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_local_grad
from torch import Tensor, nn

from hfprune_dist.core.selection import top_units
from hfprune_dist.distributed.world import World
from hfprune_dist.methods.loraprune import Factors, averaged, gone_after, unit_scores
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.structures.units import Owned, Units

PEFT_NAME = "default"  # peft's name for the only adapter
# Prefix of the names of their tensors in a snapshot.
PREFIX = "units."


def scores_of_units(
    model: nn.Module, layers: Mapping[int, list[Units]], world: World, *, whole: bool, largest_norm: float
) -> dict[tuple[str, int], Tensor]:
    """Score units by the gradients that a model's engine holds after a backward. Collective.

    Args:
        model: without peft's wrapper; its projections are LoRA layers.
        layers: layer -> kinds of its units to score.
        whole: whether frozen weights are whole on every rank; otherwise all ranks gather layer by layer.
        largest_norm: the norm that gradients are clipped to, as the optimizer will clip them afterwards.

    Returns:
        Kind and layer -> scores, float64 [units] on the CPU, those of rank 0 on all ranks.
    """
    share = _clipped_share(model, world, largest_norm)
    scores: dict[tuple[str, int], Tensor] = {}
    for layer, kinds in layers.items():
        projections: list[tuple[Units, Owned, Any]] = [
            (units, owned, model.get_submodule(units.tensor(layer, owned.tensor.removesuffix(".weight"))))
            for units in kinds
            for owned in units.owned
            if owned.tensor.endswith(".weight")  # biases have no adapters
        ]
        weights = [lora.base_layer.weight for *_, lora in projections]
        with deepspeed.zero.GatheredParameters(weights, enabled=not whole):
            for units, owned, lora in projections:
                part_U = _of_weight(lora, owned, share)
                scores[units.kind, layer] = scores.get((units.kind, layer), torch.zeros_like(part_U)) + part_U
    return world.broadcast({key: scores_U.cpu() for key, scores_U in scores.items()})  # only now the host waits


def _of_weight(lora: Any, owned: Owned, share: float) -> Tensor:
    """One weight's part of its units' scores; all ranks contribute their shards of LoRA's."""
    a, b = lora.lora_A[PEFT_NAME].weight, lora.lora_B[PEFT_NAME].weight
    a_RI, b_OR = safe_get_full_fp32_param(a), safe_get_full_fp32_param(b)
    grad_a_RI, grad_b_OR = (share * safe_get_full_grad(it).float() for it in (a, b))
    factors = Factors(a_RI, b_OR, grad_a_RI, grad_b_OR, lora.scaling[PEFT_NAME])
    return unit_scores(lora.base_layer.weight, factors, owned.axis, owned.per_unit, owned.parts)


def _clipped_share(model: nn.Module, world: World, largest_norm: float) -> float:
    """The factor by which clipping scales every gradient of this step; 1 if their norm is small enough."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    squares = torch.stack([safe_get_local_grad(it).double().square().sum() for it in trained]).sum()
    world.all_reduce(squares)
    return min(1.0, largest_norm / (math.sqrt(squares) + 1e-6))


@dataclass
class _Masked:
    """The units of one kind in one layer.

    Attributes:
        gone: how many units are masked at the end.
        average_U: averages of their scores, float64, on the CPU.
        stays_U: whether they stay, bool, on the CPU.
        mask_C: 0 or 1 for each channel that the output projection reads, on the model's device; None before ``attach``.
    """

    units: Units
    gone: int
    average_U: Tensor
    stays_U: Tensor
    mask_C: Tensor | None = None


class UnitMasks:
    """Masks for all layers that lose units.

    A unit is masked where the output projection of its block reads it: its channels of that input are multiplied by 0,
    which has the same effect as removing its weights.

    Args:
        structures: the kinds of units that the model has, by name.
        shape: what is to be left at the end; all layers stay.
        tensors: what ``state`` returned; None before the first step.
    """

    def __init__(
        self, structures: Mapping[str, Units], shape: Shape, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self._kinds = {kind: structures[kind] for kind in shape.units}
        self._masked: dict[tuple[str, int], _Masked] = {}
        for kind, units in self._kinds.items():
            for layer, (count, most) in enumerate(zip(shape.units[kind], units.counts, strict=True)):
                if count < most:
                    average_U, stays_U = torch.zeros(most, dtype=torch.float64), torch.ones(most, dtype=torch.bool)
                    self._masked[kind, layer] = _Masked(units, most - count, average_U, stays_U)
        for (kind, layer), it in self._masked.items():
            if tensors:
                it.average_U, it.stays_U = tensors[_name(kind, layer, "average")], tensors[_name(kind, layer, "stays")]

    @property
    def kinds_by_layer(self) -> dict[int, list[Units]]:
        """Number of each layer that loses units -> the kinds of units that it loses."""
        layers = sorted({layer for _, layer in self._masked})
        return {it: [masked.units for (_, layer), masked in self._masked.items() if layer == it] for it in layers}

    def attach(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Make a model compute without the masked units, now and as more are masked."""
        for (_, layer), it in self._masked.items():
            it.mask_C = torch.empty(len(it.stays_U) * it.units.channels_per_unit, device=device, dtype=dtype)
            model.get_submodule(it.units.tensor(layer, it.units.output)).register_forward_pre_hook(_masking(it))
        self._show()

    def average(self, kind: str, layer: int, scores_U: Tensor) -> None:
        """Update the averages of a layer's units with the scores of a step, float64 [units]."""
        it = self._masked[kind, layer]
        it.average_U = averaged(it.average_U, scores_U)

    def mask(self, step: int, total_steps: int) -> None:
        """Mask as many units as are to be gone after a step, the lowest averages first; masked units stay masked."""
        for it in self._masked.values():
            gone = gone_after(step, total_steps, it.gone)
            if gone:
                average_U = it.average_U.masked_fill(~it.stays_U, -torch.inf)
                it.stays_U = torch.zeros_like(it.stays_U)
                it.stays_U[top_units(average_U, len(average_U) - gone)] = True
        self._show()

    def state(self) -> dict[str, Tensor]:
        """Tensors for a snapshot."""
        told: dict[str, Tensor] = {}
        for (kind, layer), it in self._masked.items():
            told |= {_name(kind, layer, "average"): it.average_U, _name(kind, layer, "stays"): it.stays_U}
        return told

    def kept(self) -> Kept:
        """The units that aren't masked."""
        rows = {kind: [torch.arange(count) for count in units.counts] for kind, units in self._kinds.items()}
        for (kind, layer), it in self._masked.items():
            rows[kind][layer] = it.stays_U.nonzero().flatten()
        return Kept.of_all_layers(rows)

    def _show(self) -> None:
        """Apply the masks to the model. Only between steps: all activations that wait for backward are of one mask."""
        for it in self._masked.values():
            if it.mask_C is not None:
                it.mask_C.copy_(it.stays_U.repeat_interleave(it.units.channels_per_unit))


def _masking(masked: _Masked) -> Any:
    def multiply(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert masked.mask_C is not None
        return inputs[0] * masked.mask_C, *inputs[1:]

    return multiply


def _name(kind: str, layer: int, what: str) -> str:
    return f"{PREFIX}{kind}.{layer}.{what}"

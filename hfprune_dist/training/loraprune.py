"""LoRAPrune: units are scored by LoRA's own gradients as a model trains, and masked little by little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.lora_adapter import PEFT_NAME, PEFT_PREFIX
from hfprune_dist.core.devices import send
from hfprune_dist.core.selection import top_units
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.methods.loraprune import DECAY, Factors, gone_after, masks_after, unit_scores
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.structures.units import Units
from hfprune_dist.training.optimizer import Optimizer

# A kind of units and a layer.
Place = tuple[str, int]


def scores_of_units(frozen: FrozenModel, places: Mapping[Place, Units], optimizer: Optimizer) -> dict[Place, Tensor]:
    """Score units by the gradients with which LoRA's next step will be done. Collective.

    Args:
        frozen: the model; its projections are LoRA layers. If it is sharded, all ranks gather those of a place at once.
        places: where units are scored -> the units.

    Returns:
        Scores, float64 [units] on the CPU, those of rank 0 on all ranks.
    """
    weights, gradients, kept_share = optimizer.weights(), optimizer.gradients(), optimizer.kept_share()
    scores: dict[Place, Tensor] = {}
    for (kind, layer), units in places.items():
        adapted = [owned for owned in units.owned if owned[0].endswith(".weight")]  # biases have no adapters
        names = [units.tensor(layer, weight.removesuffix(".weight")) for weight, _, _ in adapted]
        loras: list[Any] = [frozen.module.get_submodule(name) for name in names]
        with frozen.gathered([lora.base_layer for lora in loras]):
            for (_, place, each), name, lora in zip(adapted, names, loras, strict=True):
                a, b = (f"{PEFT_PREFIX}{name}.lora_{factor}.{PEFT_NAME}.weight" for factor in "AB")
                slopes = kept_share * gradients[a], kept_share * gradients[b]
                factors = Factors(weights[a], weights[b], *slopes, lora.scaling[PEFT_NAME])
                part_U = unit_scores(lora.base_layer.weight, factors, place, each.entries, each.stretches)
                scores[kind, layer] = scores.get((kind, layer), torch.zeros_like(part_U)) + part_U
    found_U = torch.cat(list(scores.values())).cpu().split(list(map(len, scores.values())))  # now the host waits
    return frozen.world.broadcast(dict(zip(scores, found_U, strict=True)))


class UnitMasks:
    """Masks for all layers that lose units, by kind and layer.

    A unit is masked where the output projection of its block reads it: its channels of that input are multiplied by 0,
    which has the same effect as removing its weights.

    Args:
        structures: the kinds of units that the model has, by name.
        shape: what is to be left at the end; all layers stay.
        tensors: a snapshot's, with what ``state`` returned; none of these before the first step.
    """

    def __init__(self, structures: Mapping[str, Units], shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        self._kinds = {kind: structures[kind] for kind in shape.units}
        # How many units are masked at the end.
        self._gone: dict[Place, int] = {}
        # Averages of their scores, float64, and whether they stay, bool; on the CPU.
        self._averages: dict[Place, Tensor] = {}
        self._stays: dict[Place, Tensor] = {}
        # 0 or 1 for each channel that the output projection reads, on the model's device.
        self._masks: dict[Place, Tensor] = {}
        for kind, units in self._kinds.items():
            for layer, (count, most) in enumerate(zip(shape.units[kind], units.counts, strict=True)):
                if count < most:
                    place = kind, layer
                    self._gone[place] = most - count
                    zeros_U, ones_U = torch.zeros(most, dtype=torch.float64), torch.ones(most, dtype=torch.bool)
                    self._averages[place] = tensors.get(_name(place, "average"), zeros_U)
                    self._stays[place] = tensors.get(_name(place, "stays"), ones_U)

    @property
    def places(self) -> dict[Place, Units]:
        """Where units are lost -> the units."""
        return {(kind, layer): self._kinds[kind] for kind, layer in self._gone}

    def attach(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Make a model compute without the masked units, now and as more are masked."""
        for (kind, layer), stays_U in self._stays.items():
            units = self._kinds[kind]
            mask_C = torch.empty(len(stays_U) * units.channels_per_unit, device=device, dtype=dtype)

            def multiply(_: nn.Module, inputs: tuple[Tensor, ...], mask_C: Tensor = mask_C) -> Any:
                return inputs[0] * mask_C, *inputs[1:]

            model.get_submodule(units.tensor(layer, units.output)).register_forward_pre_hook(multiply)
            self._masks[kind, layer] = mask_C
        self._apply()

    def update(self, scores: Mapping[Place, Tensor], step: int, total_steps: int) -> None:
        """Average the scores of a step, float64 [units]. Then mask, if it is time, as many units as are to be gone
        after this step, those with the lowest averages first; masked units stay masked.
        """
        masks = masks_after(step, total_steps)
        for place, final in self._gone.items():
            average_U = DECAY * self._averages[place] + (1 - DECAY) * scores[place]
            self._averages[place] = average_U
            if masks and (gone := gone_after(step, total_steps, final)):
                of_those_U = average_U.masked_fill(~self._stays[place], -torch.inf)
                self._stays[place] = torch.zeros_like(self._stays[place])
                self._stays[place][top_units(of_those_U, len(average_U) - gone)] = True
        if masks:
            self._apply()

    def state(self) -> dict[str, Tensor]:
        """Tensors for a snapshot."""
        averages = {_name(place, "average"): average_U for place, average_U in self._averages.items()}
        return averages | {_name(place, "stays"): stays_U for place, stays_U in self._stays.items()}

    def kept(self) -> Kept:
        """The units that aren't masked."""
        rows = {kind: [torch.arange(count) for count in units.counts] for kind, units in self._kinds.items()}
        for (kind, layer), stays_U in self._stays.items():
            rows[kind][layer] = stays_U.nonzero().flatten()
        return Kept.of_all_layers(rows)

    def _apply(self) -> None:
        """Apply the masks to the model. Only between steps: all activations that wait for backward are of one mask."""
        for (kind, layer), mask_C in self._masks.items():
            stays_C = self._stays[kind, layer].repeat_interleave(self._kinds[kind].channels_per_unit)
            mask_C.copy_(send(stays_C, mask_C.device))


def _name(place: Place, what: str) -> str:
    return f"units.{place[0]}.{place[1]}.{what}"

"""Scores of units during LoRA training, from LoRA's own gradients: a layer at a time, each on one of the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_local_grad
from torch import Tensor, nn

from hfprune_dist.core.lora_scores import Factors, unit_scores
from hfprune_dist.distributed.world import World
from hfprune_dist.structures.units import Owned, Units

PEFT_NAME = "default"  # peft's name for the only adapter


class LoraGradients:
    """Gradients of a model with LoRA layers, as its engine holds them after a backward.

    Args:
        model: without peft's wrapper; its projections are LoRA layers.
        whole: whether its frozen weights are whole on every rank, rather than parameters that DeepSpeed shards.
        largest_norm: the norm that gradients are clipped to, as the optimizer will clip them afterwards.
    """

    def __init__(self, model: nn.Module, world: World, *, whole: bool, largest_norm: float) -> None:
        self._model = model
        self._world = world
        self._whole = whole
        self._largest_norm = largest_norm

    def scores(self, layers: dict[int, list[Units]]) -> dict[tuple[str, int], Tensor]:
        """Scores of units by kind and layer, float64 [units] on the CPU, the same on all ranks. Collective.

        Each rank computes those of its share of the layers. If weights are sharded, all ranks gather layer by layer.

        Args:
            layers: layer -> kinds of its units to score.
        """
        share = self._clipped_share()
        mine: dict[tuple[str, int], Tensor] = {}
        for turn, (layer, kinds) in enumerate(layers.items()):
            made_here = turn % self._world.size == self._world.rank
            with self._gathered(layer, kinds):
                for units in kinds:
                    parts = [
                        self._of_weight(units.tensor(layer, it.tensor), it, share, made_here) for it in _owned(units)
                    ]
                    if made_here:
                        mine[units.kind, layer] = torch.stack(parts).sum(0)
        told = self._world.all_gather({key: scores.cpu() for key, scores in mine.items()})  # only now the host waits
        return {key: scores for part in told for key, scores in part.items()}

    def _of_weight(self, name: str, owned: Owned, share: float, made_here: bool) -> Tensor:
        """One weight's part of its units' scores. All ranks contribute their shards of LoRA's, and one computes."""
        lora = self._projection(name)
        a, b = lora.lora_A[PEFT_NAME].weight, lora.lora_B[PEFT_NAME].weight
        a_RI, b_OR = safe_get_full_fp32_param(a), safe_get_full_fp32_param(b)
        grad_a_RI, grad_b_OR = safe_get_full_grad(a), safe_get_full_grad(b)
        if not made_here:
            return torch.empty(0)
        gradients = (share * grad_a_RI.float(), share * grad_b_OR.float())
        factors = Factors(a_RI, b_OR, *gradients, lora.scaling[PEFT_NAME])
        return unit_scores(lora.base_layer.weight, factors, owned.axis, owned.per_unit, owned.parts)

    def _clipped_share(self) -> float:
        """The factor by which clipping scales every gradient of this step; 1 if their norm is small enough."""
        squares = [
            safe_get_local_grad(parameter).double().square().sum()
            for parameter in self._model.parameters()
            if parameter.requires_grad
        ]
        norm = math.sqrt(sum(self._world.all_gather(sum(torch.stack(squares).tolist()))))
        return min(1.0, self._largest_norm / (norm + 1e-6))

    @contextmanager
    def _gathered(self, layer: int, kinds: list[Units]) -> Iterator[None]:
        """Make the weights of a layer's units whole on every rank, within the context."""
        if self._whole:
            yield
            return
        names = [units.tensor(layer, owned.tensor) for units in kinds for owned in _owned(units)]
        with deepspeed.zero.GatheredParameters([self._projection(name).base_layer.weight for name in names]):
            yield

    def _projection(self, weight: str) -> Any:
        return self._model.get_submodule(weight.removesuffix(".weight"))


def _owned(units: Units) -> list[Owned]:
    """The weights that units own; biases have no adapters."""
    return [owned for owned in units.owned if owned.tensor.endswith(".weight")]

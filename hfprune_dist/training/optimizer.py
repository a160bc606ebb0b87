"""LoRA's weights in training, and their optimizer. Frozen weights may be sharded over the ranks; these are small, and
the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hfprune_dist.distributed.world import World
from hfprune_dist.training.snapshot import MOMENTS, Snapshot

MAX_GRAD_NORM = 1.0  # the default of transformers' Trainer, which the published recipe doesn't change


class LoraOptimizer:
    """AdamW on all of LoRA's weights in one float32 vector, of which the model's own, in its dtype, are copies.

    Args:
        parameters: the model's, by their names in a ``PeftModel``.
        start: the snapshot to go on from.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float, start: Snapshot) -> None:
        self._parameters = parameters
        device = next(iter(parameters.values())).device

        def vector(tensors: Mapping[str, Tensor], suffix: str = "") -> Tensor:
            return torch.cat([tensors[name + suffix].flatten().to(device, torch.float32) for name in parameters])

        self._weights = nn.Parameter(vector(start.tensors if start.step else parameters))
        self._gradient = self._weights.grad = torch.zeros_like(self._weights)
        self._adamw = torch.optim.AdamW([self._weights], weight_decay=weight_decay)
        if start.step:
            moments = {moment: vector(start.tensors, f".{moment}") for moment in MOMENTS}
            self._adamw.state[self._weights] = {"step": torch.tensor(float(start.step)), **moments}
        self._show()

    def weights(self) -> dict[str, Tensor]:
        """The weights by the parameters' names, float32."""
        return self._by_name(self._weights.data)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the next step will clip and use."""
        return self._by_name(self._gradient)

    def add_gradients(self) -> None:
        """Take over what a backward left in the model's parameters."""
        for name, gradient in self.gradients().items():
            if (found := self._parameters[name].grad) is not None:
                gradient += found
            self._parameters[name].grad = None

    def sum_over_ranks(self, world: World) -> None:
        """Add up the ranks' gradients; collective."""
        world.all_reduce(self._gradient)

    def kept_share(self) -> Tensor:
        """The share of each gradient that is left once all of them are clipped, a scalar on the device."""
        share: Tensor = MAX_GRAD_NORM / (self._gradient.norm() + 1e-6)
        return share.clamp(max=1.0)

    def step(self, learning_rate: float) -> float:
        """Clip, do a step, and return the gradients' norm before clipping."""
        norm = self._gradient.norm()
        self._gradient *= self.kept_share()
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
        self._gradient.zero_()
        self._show()
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """A snapshot's tensors, on the CPU."""
        found = {name: weight.cpu() for name, weight in self.weights().items()}
        for moment in MOMENTS:
            parts = self._by_name(self._adamw.state[self._weights][moment])
            found |= {f"{name}.{moment}": part.cpu() for name, part in parts.items()}
        return found

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector's parts, as views of it."""
        parts = vector.split([parameter.numel() for parameter in self._parameters.values()])
        return {name: part.view_as(self._parameters[name]) for name, part in zip(self._parameters, parts, strict=True)}

    @torch.no_grad()
    def _show(self) -> None:
        for name, weight in self.weights().items():
            self._parameters[name].copy_(weight)

"""What is trained, and its optimizer. Other weights may be sharded over the ranks; trained ones are whole on each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.config.training import Training
from hfprune_dist.distributed.world import World
from hfprune_dist.training.snapshot import MOMENTS, WEIGHTS, Snapshot


class Optimizer:
    """AdamW on all trained weights in one float32 vector, of which the model's own, in its dtype, are copies.

    LoRA's weights are few, so each rank has the vector. Otherwise ranks share it, with the moments (as ZeRO-1 does);
    gradients are whole on each.

    Args:
        parameters: the model's, by the names that snapshots have for them.
        start: the snapshot to go on from.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: Training, start: Snapshot, world: World
    ) -> None:
        self._parameters, self._settings, self._world = parameters, settings, world
        self._shares, self._rank = (1, 0) if settings.method == "lora" else (world.size, world.rank)
        device = next(iter(parameters.values())).device
        self._numbers = sum(parameter.numel() for parameter in parameters.values())
        self._gradient = torch.empty(self._numbers, device=device)
        own = self._share(self._rank)
        if start.step:
            weights = start.vector(WEIGHTS, own).to(device)
        else:
            for name, part in self._by_name(self._gradient).items():
                part.copy_(parameters[name].detach())
            weights = self._gradient[own].clone()
        self._gradient.zero_()
        self._weights = nn.Parameter(weights)
        self._weights.grad = self._gradient[own]
        self._adamw = torch.optim.AdamW([self._weights], weight_decay=0.0)  # which would be of the whole vector
        self._norm = torch.zeros((), device=device)
        if start.step:
            moments = {moment: start.vector(moment, own).to(device) for moment in MOMENTS}
            self._adamw.state[self._weights] = {"step": torch.tensor(float(start.step)), **moments}
        for name, sum_of_gradients in self.gradients().items():
            parameters[name].register_post_accumulate_grad_hook(partial(_take_over, sum_of_gradients))
        self._copy_to_model()

    def weights(self) -> dict[str, Tensor]:
        """The weights by the parameters' names, float32; LoRA's only."""
        return self._by_name(self._weights.data)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that the next step will clip and use, to which each backward adds its own."""
        return self._by_name(self._gradient)

    def sum_over_ranks(self) -> None:
        """Add up the ranks' gradients; collective."""
        self._world.all_reduce(self._gradient)
        self._norm = self._gradient.norm()

    def kept_share(self) -> Tensor:
        """The share of each gradient that is left once all of them are clipped, a scalar on the device."""
        share: Tensor = self._settings.max_grad_norm / (self._norm + 1e-6)
        return share.clamp(max=1.0)

    def step(self, learning_rate: float) -> float:
        """Clip, do a step, and return the gradients' norm before clipping; collective."""
        self._gradient *= self.kept_share()
        for parameter, _, here in self._overlaps(self._share(self._rank)):
            if self._settings.weight_decay and parameter.ndim > 1:  # neither norms nor biases
                self._weights.data[here] *= 1 - learning_rate * self._settings.weight_decay
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
        self._gradient.zero_()
        self._copy_to_model()
        return float(self._norm)

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the parameters, in the vector's order."""
        return {name: list(parameter.shape) for name, parameter in self._parameters.items()}

    def state(self) -> dict[str, Tensor] | None:
        """The rank's share of the vector and of the moments, on the CPU; None if another rank has the same."""
        if self._world.rank >= self._shares:
            return None
        moments = {moment: self._adamw.state[self._weights][moment].cpu() for moment in MOMENTS}
        return {WEIGHTS: self._weights.detach().cpu(), **moments}

    def _share(self, rank: int) -> slice:
        size = -(-self._numbers // self._shares)
        return slice(min(rank * size, self._numbers), min((rank + 1) * size, self._numbers))

    def _by_name(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector's parts, as views of it."""
        parts = vector.split([parameter.numel() for parameter in self._parameters.values()])
        return {name: part.view_as(self._parameters[name]) for name, part in zip(self._parameters, parts, strict=True)}

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        """Copy the weights to the model, each share from the rank that has it."""
        for rank in range(self._shares):
            share, weights = self._share(rank), self._weights.data
            if self._shares > 1:
                weights = weights if rank == self._rank else weights.new_empty(share.stop - share.start)
                self._world.broadcast_tensor(weights, rank)
            for parameter, there, here in self._overlaps(share):
                parameter.data.view(-1)[there].copy_(weights[here])

    def _overlaps(self, share: slice) -> Iterator[tuple[nn.Parameter, slice, slice]]:
        """Parameters with numbers in a share of the vector: which of their numbers, and where in the share."""
        begin = 0
        for parameter in self._parameters.values():
            end = begin + parameter.numel()
            first, last = max(begin, share.start), min(end, share.stop)
            if first < last:
                yield parameter, slice(first - begin, last - begin), slice(first - share.start, last - share.start)
            begin = end


def _take_over(sum_of_gradients: Tensor, parameter: Tensor) -> None:
    """Hook that adds what a backward left in a parameter to a sum."""
    assert parameter.grad is not None
    sum_of_gradients.add_(parameter.grad)
    parameter.grad = None

"""Norms whose outputs are multiplied by a factor for each channel, in their own weights."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.errors import UserError

# Norms multiply by their weight, or by 1 + their weight.
OFFSETS = (0.0, 1.0)
# What outputs may depart from twice their size, as a share of the largest: some norms round to bfloat16 on the way.
TOLERANCE = 0.02


def norms_of_layers(checkpoint: Checkpoint, layers: Container[int]) -> list[tuple[int, str]]:
    """The norms of some layers' hidden states, before or after attention and MLP: (layer, name within it), in order.

    They are the parts of a layer that have a number for each hidden channel and no parts of their own.
    """
    prefix, size = f"{checkpoint.family.layers}.", (checkpoint.config["hidden_size"],)
    one_each = (name for name, it in checkpoint.tensors.items() if tuple(it.shape) == size)
    parts = (name.removeprefix(prefix).split(".") for name in one_each if name.startswith(prefix))
    norms = ((int(it[0]), it[1]) for it in parts if len(it) == 3 and it[2] == "weight")
    return sorted(norm for norm in norms if norm[0] in layers)


def with_factors(norm: nn.Module, factors_C: Tensor) -> dict[str, Tensor]:
    """The values of a norm's parameters with which its outputs are multiplied by these factors, in float32.

    Args:
        norm: a norm over the last dimension, with a weight and perhaps a bias.
        factors_C: [hidden_size], on the norm's device.

    Raises:
        UserError: if there are no such values.
    """
    return _scaled(_parameters(norm), factors_C.float(), weight_offset(norm))


@torch.no_grad()
def weight_offset(norm: nn.Module, called: str = "a norm") -> float:
    """The number that a norm adds to its weight before it multiplies by it: 0 or 1, whatever its weight.

    Args:
        called: what messages call the norm.

    Raises:
        UserError: if its outputs are no multiple of its weight plus either of them.
    """
    # Next to a large weight of its own, 1 more would be lost in what outputs may depart.
    parameters = {name: torch.ones_like(it) for name, it in _parameters(norm).items()}
    if "weight" in parameters and parameters.keys() <= {"weight", "bias"}:
        twice_C = torch.full_like(parameters["weight"], 2.0)
        sample_NC = torch.randn(8, len(twice_C), generator=torch.Generator().manual_seed(0)).to(twice_C)
        wanted_NC = 2 * functional_call(norm, parameters, sample_NC)
        for offset in OFFSETS:
            departure_NC = functional_call(norm, _scaled(parameters, twice_C, offset), sample_NC) - wanted_NC
            if departure_NC.abs().max() <= TOLERANCE * wanted_NC.abs().max():
                return offset
    raise UserError(
        f"{called}, {type(norm).__name__}, has no weight that multiplies its outputs; set prune.effort to quick"
    )


def _parameters(norm: nn.Module) -> dict[str, Tensor]:
    return {name: it.data.float() for name, it in norm.named_parameters()}


def _scaled(parameters: dict[str, Tensor], factors_C: Tensor, offset: float) -> dict[str, Tensor]:
    scaled = {name: it * factors_C for name, it in parameters.items()}
    return scaled | {"weight": (parameters["weight"] + offset) * factors_C - offset}


@dataclass(frozen=True)
class Multiplied:
    """What a norm has put out in one call, and the same times its factors, each [..., hidden_size]."""

    norm: int
    output_BTC: Tensor
    product_BTC: Tensor


@contextmanager
def multiplying(norms: Mapping[int, nn.Module], factors_RC: Tensor) -> Iterator[list[Multiplied]]:
    """Multiply norms' outputs by factors, and collect them.

    Args:
        norms: number of a norm -> the norm.
        factors_RC: float32 [norms, hidden_size], on the norms' device.
    """
    seen: list[Multiplied] = []

    def hooked(number: int, norm: nn.Module) -> RemovableHandle:
        def multiply(_norm: nn.Module, _inputs: object, output_BTC: Tensor) -> Tensor:
            product_BTC = (output_BTC * factors_RC[number]).to(output_BTC)
            seen.append(Multiplied(number, output_BTC, product_BTC))
            return product_BTC

        return norm.register_forward_hook(multiply)

    with ExitStack() as hooks:
        for number, norm in norms.items():
            hooks.callback(hooked(number, norm).remove)
        yield seen

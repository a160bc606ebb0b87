"""Norms whose outputs are multiplied by a factor for each channel, in their own weights."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.errors import UserError

# Norms multiply by their weight, or by 1 + their weight.
OFFSETS = (0.0, 1.0)
# What outputs may depart from a multiple, as a share of the largest: some norms round to bfloat16 on the way.
TOLERANCE = 0.02


def norms_of_layers(checkpoint: Checkpoint, layers: Container[int]) -> list[tuple[int, str]]:
    """The norms of some layers' hidden states, before or after attention and MLP: (layer, name within it), in order.

    They are the parts of a layer that have a number for each hidden channel and no parts of their own.
    """
    prefix, size = f"{checkpoint.family.layers}.", (checkpoint.config["hidden_size"],)
    one_each = (name for name, info in checkpoint.tensors.items() if tuple(info.shape) == size)
    parts = (name.removeprefix(prefix).split(".") for name in one_each if name.startswith(prefix))
    norms = ((int(names[0]), names[1]) for names in parts if len(names) == 3 and names[2] == "weight")
    return sorted(norm for norm in norms if norm[0] in layers)


def with_factors(norm: nn.Module, factors_C: Tensor) -> dict[str, Tensor]:
    """The values of a norm's parameters, a weight and perhaps a bias, with which its outputs are multiplied by these
    factors [hidden_size], in float32; refused as by ``weight_offset``.
    """
    factors_C, offset = factors_C.float(), weight_offset(norm)
    scaled = {name: parameter.data.float() * factors_C for name, parameter in norm.named_parameters()}
    return scaled | {"weight": scaled["weight"] + offset * (factors_C - 1)}


@torch.no_grad()
def weight_offset(norm: nn.Module, called: str = "a norm") -> float:
    """The number that a norm adds to its weight before it multiplies by it: 0 or 1, whatever its weight. A norm whose
    outputs are no multiple of its weight plus either of them is refused, in a message that says what it is ``called``.
    """
    zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in norm.named_parameters()}
    if "weight" in zeros and zeros.keys() <= {"weight", "bias"}:
        sample_NC = torch.randn(8, len(zeros["weight"]), generator=torch.Generator().manual_seed(0)).to(zeros["weight"])
        at_0_NC, at_1_NC, at_2_NC = (
            functional_call(norm, zeros | {"weight": zeros["weight"] + value}, sample_NC) for value in (0.0, 1.0, 2.0)
        )
        each_NC = at_1_NC - at_0_NC
        for offset in OFFSETS:
            departures = at_0_NC - offset * each_NC, at_2_NC - (2 + offset) * each_NC
            if max(float(departure.abs().max()) for departure in departures) <= TOLERANCE * float(each_NC.abs().max()):
                return offset
    raise UserError(
        f"{called}, {type(norm).__name__}, has no weight that multiplies its outputs; set prune.effort to quick"
    )


@contextmanager
def multiplying(norms: Mapping[int, nn.Module], factors_RC: Tensor) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """Multiply the outputs of norms, by their numbers, by factors [norms, hidden_size] in float32 on their device; and
    collect (number of the norm, its output, the product).
    """
    seen: list[tuple[int, Tensor, Tensor]] = []

    def multiply(number: int, _norm: nn.Module, _inputs: object, output_BTC: Tensor) -> Tensor:
        product_BTC = (output_BTC * factors_RC[number]).to(output_BTC)
        seen.append((number, output_BTC, product_BTC))
        return product_BTC

    with ExitStack() as hooks:
        for number, norm in norms.items():
            hooks.callback(norm.register_forward_hook(partial(multiply, number)).remove)
        yield seen

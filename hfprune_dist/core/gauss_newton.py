"""Gauss-Newton steps on all three weights of a pruned MLP, which bring its outputs closer to given targets.

With y the targets, minimise the sum over tokens of ||y - D h||^2, h = act(G x) * (U x), over gate G, up U and down D
of the kept neurons, step by step: h is taken as linear in G and U around their present values, and the damped normal
equations (J^T J + damping diag(J^T J)) delta = J^T r are solved by conjugate gradients, which need only products with J
and J^T. They are preconditioned with blocks of J^T J in Kronecker form (as in K-FAC, arXiv 1503.05671). No new
parameters; biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from hfprune_dist.core.gram import damped_inverse, damping_of, gram_matrix

DAMPING = 1e-2


@dataclass(frozen=True)
class MlpWeights:
    """Gate and up [kept, hidden_size] and down [hidden_size, kept] of one layer, or a change of them."""

    gate_KC: Tensor
    up_KC: Tensor
    down_CK: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.gate_KC, self.up_KC, self.down_CK

    def to(self, dtype: torch.dtype) -> MlpWeights:
        return MlpWeights(*(it.to(dtype) for it in self.tensors()))

    def plus(self, other: MlpWeights, scale: float = 1.0) -> MlpWeights:
        return MlpWeights(*(a + scale * b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def times(self, other: MlpWeights) -> MlpWeights:
        return MlpWeights(*(a * b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def dot(self, other: MlpWeights) -> float:
        return sum(
            float((a * b).sum(dtype=torch.float64)) for a, b in zip(self.tensors(), other.tensors(), strict=True)
        )


@dataclass(frozen=True)
class Biases:
    """Of gate and up [kept], where the architecture has them; and what it puts the gate through."""

    gate_K: Tensor | None = None
    up_K: Tensor | None = None
    activation: Callable[[Tensor], Tensor] = silu

    def acted(self, gate_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The activation of a gate, and its derivative there."""
        if self.activation is silu:
            sigmoid_NK = gate_NK.sigmoid()
            return silu(gate_NK), sigmoid_NK * (1 + gate_NK * (1 - sigmoid_NK))
        with torch.enable_grad():
            gate_NK = gate_NK.detach().requires_grad_()
            acted_NK = self.activation(gate_NK)
            (slope_NK,) = torch.autograd.grad(acted_NK.sum(), gate_NK)
        return acted_NK.detach(), slope_NK


class Linearized:
    """The MLP around some weights, on some tokens.

    Args:
        weights: in the dtype of all products; ``down_CK`` is kept.
        input_NC: what the MLP reads, in that dtype [tokens, hidden_size]; kept.
    """

    def __init__(self, weights: MlpWeights, biases: Biases, input_NC: Tensor) -> None:
        gate_NK = linear(input_NC, weights.gate_KC, biases.gate_K)
        up_NK = linear(input_NC, weights.up_KC, biases.up_K)
        acted_NK, slope_NK = biases.acted(gate_NK)
        self._input_NC = input_NC
        self._down_CK = weights.down_CK
        self._by_up_NK = acted_NK
        self._by_gate_NK = slope_NK * up_NK
        self.hidden_NK = self._by_up_NK * up_NK

    @staticmethod
    def bytes_of(weights: MlpWeights, input_NC: Tensor) -> int:
        """What one of these keeps of its own: the inputs, and three numbers for each token and kept neuron."""
        tokens, hidden_size = input_NC.shape
        return tokens * (3 * len(weights.gate_KC) + hidden_size) * input_NC.itemsize

    def output(self) -> Tensor:
        """[tokens, hidden_size], float32, without the down projection's bias."""
        return linear(self.hidden_NK, self._down_CK).float()

    def forward(self, change: MlpWeights) -> Tensor:
        """J change: how the outputs move, float32 [tokens, hidden_size]; ``change`` is in the dtype of products."""
        hidden_NK = linear(self._input_NC, change.gate_KC).mul_(self._by_gate_NK)
        hidden_NK += linear(self._input_NC, change.up_KC).mul_(self._by_up_NK)
        return linear(hidden_NK, self._down_CK).float() + linear(self.hidden_NK, change.down_CK).float()

    def backward(self, error_NC: Tensor) -> MlpWeights:
        """J^T error, from [tokens, hidden_size]."""
        error_NC = error_NC.to(self._input_NC.dtype)
        hidden_NK = error_NC @ self._down_CK
        return MlpWeights(
            ((hidden_NK * self._by_gate_NK).T @ self._input_NC).float(),
            ((hidden_NK * self._by_up_NK).T @ self._input_NC).float(),
            (error_NC.T @ self.hidden_NK).float(),
        )

    def curvature(self) -> tuple[Tensor, Tensor, Tensor]:
        """What ``GaussNewtonSums`` sums over tokens, of these: its ``gate_K``, ``up_K`` and ``inputs_CC``."""
        columns_K = self._down_CK.float().square().sum(dim=0)
        return (
            columns_K * self._by_gate_NK.float().square().sum(dim=0),
            columns_K * self._by_up_NK.float().square().sum(dim=0),
            gram_matrix(self._input_NC.float()),
        )


@dataclass(frozen=True)
class GaussNewtonSums:
    """What J^T J looks like where neurons don't meet in gate and up, nor outputs in down.

    Attributes:
        gate_K: sum over tokens of the squared derivative of the outputs by each neuron's gate [kept].
        up_K: the same by its up.
        inputs_CC: sum of x x^T [hidden_size, hidden_size].
        hidden_KK: sum of h h^T [kept, kept].
        tokens: how many there are.
    """

    gate_K: Tensor
    up_K: Tensor
    inputs_CC: Tensor
    hidden_KK: Tensor
    tokens: int

    def diagonal(self) -> MlpWeights:
        """About that of J^T J: derivatives and inputs are taken as independent."""
        inputs_C = self.inputs_CC.diagonal() / self.tokens
        return MlpWeights(
            torch.outer(self.gate_K, inputs_C),
            torch.outer(self.up_K, inputs_C),
            self.hidden_KK.diagonal().to(inputs_C).expand(len(inputs_C), -1),
        )

    def inverse(self) -> Callable[[MlpWeights], MlpWeights]:
        """About (J^T J)^-1, damped, as a product."""
        by_inputs_CC = damped_inverse(self.inputs_CC / self.tokens, DAMPING).float()
        by_hidden_KK = damped_inverse(self.hidden_KK, DAMPING).float()
        gate_K, up_K = (it + damping_of(it, DAMPING) for it in (self.gate_K, self.up_K))
        return lambda it: MlpWeights(
            it.gate_KC @ by_inputs_CC / gate_K[:, None],
            it.up_KC @ by_inputs_CC / up_K[:, None],
            it.down_CK @ by_hidden_KK,
        )


def solve_normal_equations(
    product: Callable[[MlpWeights], MlpWeights], right: MlpWeights, curvature: GaussNewtonSums, iterations: int
) -> MlpWeights:
    """(J^T J + DAMPING (diag + its mean)) x = right, by preconditioned conjugate gradients.

    Args:
        product: v -> J^T J v.
        right: J^T of the residual.
        curvature: on the same tokens.
    """
    damping = MlpWeights(*(DAMPING * (it + it.mean()) for it in curvature.diagonal().tensors()))
    inverse = curvature.inverse()
    solution = MlpWeights(*(torch.zeros_like(it) for it in right.tensors()))
    residual, direction = right, inverse(right)
    power = residual.dot(direction)
    for _ in range(iterations):
        if power <= 0:  # solved, up to rounding
            break
        bent = product(direction).plus(damping.times(direction))
        step = power / direction.dot(bent)
        solution, residual = solution.plus(direction, step), residual.plus(bent, -step)
        before, preconditioned = power, inverse(residual)
        power = residual.dot(preconditioned)
        direction = preconditioned.plus(direction, power / before)
    return solution

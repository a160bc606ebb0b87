"""Gauss-Newton steps on all three weights of a pruned MLP, which bring its outputs closer to given targets.

With y the targets, minimise the sum over tokens of ||y - D h||^2, h = act(G x) * (U x) or, without a gate, act(U x),
over gate G, up U and down D of the kept neurons. In each step, h is taken as linear in G and U around their current
values, and the damped normal equations (J^T J + damping (diag(J^T J) + ridge)) delta = J^T r are solved by conjugate
gradients, which need only products with J and J^T. A neuron's ridge (``ridge_of``) is the same in any units of its
activation. They are preconditioned with blocks of J^T J in Kronecker form (as in K-FAC, arXiv 1503.05671). No
parameters are added, and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from hfprune_dist.core.gram import damped_inverse, gram_matrix, ridge_of
from hfprune_dist.core.portions import wide_product

DAMPING = 1e-2


@dataclass(frozen=True)
class MlpWeights:
    """Gate and up (or only up) [kept, hidden_size] and down [hidden_size, kept] of one layer, or a change of them."""

    rows_KC: tuple[Tensor, ...]
    down_CK: Tensor

    @classmethod
    def of(cls, *tensors: Tensor) -> MlpWeights:
        """Return weights of such ``tensors``, down last."""
        return cls(tensors[:-1], tensors[-1])

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.rows_KC, self.down_CK

    def to(self, dtype: torch.dtype) -> MlpWeights:
        return MlpWeights.of(*(tensor.to(dtype) for tensor in self.tensors()))

    def plus(self, other: MlpWeights, scale: float | Tensor = 1.0) -> MlpWeights:
        """Return ``self + scale * other``."""
        return MlpWeights.of(*((scale * b).add_(a) for a, b in self._beside(other)))  # which makes no third tensor

    def times(self, other: MlpWeights) -> MlpWeights:
        """Return the product, element by element."""
        return MlpWeights.of(*(a * b for a, b in self._beside(other)))

    def dot(self, other: MlpWeights) -> Tensor:
        """Return the inner product over all weights, added up in float64."""
        first, *others = [(a * b).sum(dtype=torch.float64) for a, b in self._beside(other)]
        return sum(others, first)

    def _beside(self, other: MlpWeights) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.tensors(), other.tensors(), strict=True)


@dataclass(frozen=True)
class Biases:
    """Biases and activation function of an MLP, as applied to the outputs of gate and up.

    Attributes:
        rows_K: biases [kept] of gate and up, or only of up; None where the architecture has none.
        activation: activation function of the first of these projections.
    """

    rows_K: tuple[Tensor | None, ...] = (None, None)
    activation: Callable[[Tensor], Tensor] = silu

    def acted(self, gate_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation of a gate (or of up, if there is no gate), and its derivative there."""
        if self.activation is silu:
            sigmoid_NK = gate_NK.sigmoid()
            return silu(gate_NK), sigmoid_NK * (1 + gate_NK * (1 - sigmoid_NK))
        with torch.enable_grad():
            gate_NK = gate_NK.detach().requires_grad_()
            acted_NK = self.activation(gate_NK)
            (slope_NK,) = torch.autograd.grad(acted_NK.sum(), gate_NK)
        return acted_NK.detach(), slope_NK


class Linearized:
    """The MLP linearized around some weights, on some tokens.

    Args:
        weights: in the dtype of all products; a reference to ``down_CK`` is kept.
        input_NC: the MLP's inputs, in that dtype; a reference is kept.
    """

    def __init__(self, weights: MlpWeights, biases: Biases, input_NC: Tensor) -> None:
        pairs = zip(weights.rows_KC, biases.rows_K, strict=True)
        first_NK, *gated = [linear(input_NC, weight_KC, bias_K) for weight_KC, bias_K in pairs]
        acted_NK, slope_NK = biases.acted(first_NK)
        self._input_NC = input_NC
        self._down_CK = weights.down_CK
        self.hidden_NK, self._by_rows_NK = acted_NK, [slope_NK]
        for up_NK in gated:
            self.hidden_NK, self._by_rows_NK = acted_NK * up_NK, [slope_NK * up_NK, acted_NK]

    @staticmethod
    def bytes_of(weights: MlpWeights, input_NC: Tensor) -> int:
        """Return the bytes that an instance keeps: inputs and, per token and neuron, activation and derivatives."""
        tokens, hidden_size = input_NC.shape
        return tokens * (len(weights.tensors()) * weights.down_CK.shape[1] + hidden_size) * input_NC.itemsize

    def output(self) -> Tensor:
        """Return the outputs [tokens, hidden_size], float32, without the down projection's bias."""
        return linear(self.hidden_NK, self._down_CK).float()

    def forward(self, change: MlpWeights) -> Tensor:
        """Return J change, the change of the outputs, float32 [tokens, hidden_size]; ``change`` has products' dtype."""
        first, *gated = zip(change.rows_KC, self._by_rows_NK, strict=True)
        hidden_NK = linear(self._input_NC, first[0]).mul_(first[1])
        for row_KC, by_row_NK in gated:
            hidden_NK += linear(self._input_NC, row_KC).mul_(by_row_NK)
        return linear(hidden_NK, self._down_CK).float() + linear(self.hidden_NK, change.down_CK).float()

    def backward(self, error_NC: Tensor) -> MlpWeights:
        """Return J^T error, for an error [tokens, hidden_size], in float32."""
        error_NC = error_NC.to(self._input_NC.dtype)
        hidden_NK = error_NC @ self._down_CK
        return MlpWeights.of(
            *(wide_product(hidden_NK * by_row_NK, self._input_NC) for by_row_NK in self._by_rows_NK),
            wide_product(error_NC, self.hidden_NK),
        )

    def curvature(self) -> tuple[Tensor, ...]:
        """Return the sums over these tokens that ``GaussNewtonSums`` needs: its ``rows_K``, then ``inputs_CC``."""
        columns_K = self._down_CK.float().square().sum(dim=0)
        return (
            *(columns_K * by_row_NK.float().square().sum(dim=0) for by_row_NK in self._by_rows_NK),
            gram_matrix(self._input_NC),
        )


@dataclass(frozen=True)
class GaussNewtonSums:
    """Approximation of J^T J without the terms between different neurons in gate and up, or different outputs in down.

    Attributes:
        rows_K: sum over tokens of the outputs' squared derivatives with respect to each neuron's gate, and to its up.
        inputs_CC, hidden_KK: sums of x x^T and h h^T over so many ``tokens``.
        around: the weights around which the MLP is linearized.
    """

    rows_K: tuple[Tensor, ...]
    inputs_CC: Tensor
    hidden_KK: Tensor
    tokens: int
    around: MlpWeights

    def damping(self) -> MlpWeights:
        """Return what is added to the diagonal of J^T J, with derivatives and inputs taken as independent."""
        inputs_C, (*ridges_K, of_down_K) = self.inputs_CC.diagonal() / self.tokens, self._ridges()
        pairs, down_K = zip(self.rows_K, ridges_K, strict=True), DAMPING * self.hidden_KK.diagonal().float() + of_down_K
        rows_KC = [DAMPING * row_K[:, None] * inputs_C + ridge_K[:, None] * inputs_C.mean() for row_K, ridge_K in pairs]
        return MlpWeights.of(*rows_KC, down_K.expand(len(inputs_C), -1))

    def _ridges(self) -> list[Tensor]:
        """Each neuron's ridge in gate and up, to be multiplied by the inputs' mean energy; the last is that in down."""
        energies_K = *self.rows_K, self.hidden_KK.diagonal().float()
        rows_KC = *self.around.rows_KC, self.around.down_CK.T
        weights_K = (row_KC.square().sum(dim=1) for row_KC in rows_KC)
        return [ridge_of(DAMPING, *pair) for pair in zip(energies_K, weights_K, strict=True)]

    def inverse(self) -> Callable[[MlpWeights], MlpWeights]:
        """Return a function that multiplies by about (J^T J)^-1, damped; raises as ``damped_inverse``."""
        inputs_CC, (*ridges_K, hidden_K) = self.inputs_CC / self.tokens, self._ridges()
        by_inputs_CC = damped_inverse(inputs_CC, ridge_of(DAMPING, inputs_CC.diagonal()))
        by_hidden_KK = damped_inverse(self.hidden_KK.float(), hidden_K)
        rows_K = [row_K + ridge_K for row_K, ridge_K in zip(self.rows_K, ridges_K, strict=True)]
        return lambda change: MlpWeights.of(
            *(row_KC @ by_inputs_CC / row_K[:, None] for row_KC, row_K in zip(change.rows_KC, rows_K, strict=True)),
            change.down_CK @ by_hidden_KK,
        )


def solve_normal_equations(
    product: Callable[[MlpWeights], MlpWeights],
    squared_length: Callable[[MlpWeights], Tensor],
    right: MlpWeights,
    curvature: GaussNewtonSums,
    iterations: int,
) -> MlpWeights:
    """Return an approximate solution x of (J^T J + damping) x = right, damped as ``curvature`` says, by preconditioned
    conjugate gradients from x = 0; raises UnresolvedError as ``damped_inverse``.

    Args:
        product: v -> J^T J v.
        squared_length: v -> ||J v||^2, which is all that the last iteration needs, at half the price.
        right: J^T residual.
        iterations: how many; those after the residual has vanished change nothing. A GPU's host waits for none of them.
    """
    damping, inverse = curvature.damping(), curvature.inverse()
    solution = MlpWeights.of(*(torch.zeros_like(tensor) for tensor in right.tensors()))
    residual, direction = right, inverse(right)
    rho = residual.dot(direction)
    for following in reversed(range(iterations)):
        is_solved, damped = rho <= 0, damping.times(direction)  # up to rounding
        if not following:
            step = rho / (squared_length(direction) + direction.dot(damped))
            solution = solution.plus(direction, step.masked_fill(is_solved, 0))
            break
        image = product(direction).plus(damped)
        step = (rho / direction.dot(image)).masked_fill(is_solved, 0)
        solution, residual = solution.plus(direction, step), residual.plus(image, -step)
        rho_before, preconditioned = rho, inverse(residual)
        rho = residual.dot(preconditioned)
        direction = preconditioned.plus(direction, (rho / rho_before).masked_fill(is_solved, 0))
    return solution

"""Scores of MLP neurons, reduced inside backward hooks so that no activation gradient outlives its layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """Activations or gradients of a layer are NaN or infinite; the message says which."""


class TaylorScores:
    """Accumulates score_n = sum over tokens of |h_n * dL/dh_n| for every neuron (HFPrune, eq. for S_n, L = H).

    ``h`` is the input of a layer's down projection. The gradient graph begins at the first layer's ``h``: nothing
    below it needs a gradient, and no parameter does.

    Args:
        down_projections: one module per layer, in order.
        intermediate_size: neurons per layer.

    Attributes:
        scores_LD: float64 [num_layers, intermediate_size] on the CPU.
    """

    def __init__(self, down_projections: Sequence[nn.Module], intermediate_size: int) -> None:
        self._modules = down_projections
        self.scores_LD = torch.zeros(len(down_projections), intermediate_size, dtype=torch.float64)
        self._partial: dict[int, Tensor] = {}
        self._activation_sum: dict[int, Tensor] = {}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Hook the modules for one forward and backward, then add what they saw to the scores.

        Raises:
            NonFiniteError: where a layer saw NaN or infinity; the scores are then left as they were.
        """
        handles = [
            module.register_forward_pre_hook(self._make_hook(layer), prepend=True)
            for layer, module in enumerate(self._modules)
        ]
        try:
            yield
            self._absorb()
        finally:
            for handle in handles:
                handle.remove()
            self._partial.clear()
            self._activation_sum.clear()

    def _make_hook(self, layer: int):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def before_down_projection(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden_BTD,) = inputs
            if not hidden_BTD.requires_grad:
                hidden_BTD = hidden_BTD.detach().requires_grad_()
            self._activation_sum[layer] = hidden_BTD.detach().sum()
            hidden_BTD.register_hook(lambda gradient_BTD: self._reduce(layer, hidden_BTD.detach(), gradient_BTD))
            return (hidden_BTD,)

        return before_down_projection

    def _reduce(self, layer: int, hidden_BTD: Tensor, gradient_BTD: Tensor) -> None:
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        self._partial[layer] = (hidden_BTD.to(wide) * gradient_BTD).abs_().flatten(0, -2).sum(dim=0)

    def _absorb(self) -> None:
        """Add one backward's float32 sums to the float64 scores."""
        layers = range(len(self._modules))
        partial_LD = torch.stack([self._partial[layer] for layer in layers]).cpu()
        if not partial_LD.isfinite().all():
            self._explain(partial_LD)
        self.scores_LD += partial_LD

    def _explain(self, partial_LD: Tensor) -> None:
        finite = [bool(self._activation_sum[layer].isfinite()) for layer in range(len(self._modules))]
        if not all(finite):
            raise NonFiniteError(f"activations of layer {finite.index(False)} are NaN or infinite")
        lost = (~partial_LD.isfinite().all(dim=1)).nonzero().max().item()
        raise NonFiniteError(f"gradients of layer {lost} are NaN or infinite")

"""L-BFGS: the minimum of a smooth function of many numbers, found from its values and gradients at a few places.

Steps and the changes of gradients along them stand in for the second derivatives (Nocedal and Wright, Numerical
Optimization, 2nd edition, algorithm 7.4). The first step has nothing but a guess at them, which may be out by a factor:
later steps correct the factor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Root mean square of the first step's numbers.
FIRST_STEP = 0.015
# After a step that leads up, the next one goes only this share of it.
SHORTER = 0.25
# Most places that are looked at. The search ends earlier if the next step would lower the value by less than this share
# of it, as far as gradients can tell.
PASSES, LITTLE = 8, 3e-3


class QuasiNewton:
    """A search that says where to look next, and is told what is there.

    Args:
        start_P: the first place, float64 [numbers].
        curvature_P: second derivatives along each number alone, or anything in proportion to them; positive, float64.

    Attributes:
        candidate_P: the place to look at next.
        best_P: the lowest place so far, at which the search ends.
        values: of the function, at all places so far.
    """

    def __init__(self, start_P: Tensor, curvature_P: Tensor) -> None:
        self.candidate_P = self.best_P = start_P
        self.values: list[float] = []
        self.is_over = False
        self._curvature_P = curvature_P
        self._gradient_P = self._step_P = torch.zeros_like(start_P)
        # Steps between places, and how gradients changed along them; the latest last.
        self._steps: list[Tensor] = []
        self._changes: list[Tensor] = []

    def tell(self, value: float, gradient_P: Tensor) -> None:
        """Take in the value and the gradient, float64 [numbers], at ``candidate_P``; the first value is finite."""
        gain = math.inf
        if not self.values or value < min(self.values):
            step_P, change_P = self.candidate_P - self.best_P, gradient_P - self._gradient_P
            if step_P @ change_P > 0:  # where the function is convex; the first step is 0
                self._steps.append(step_P)
                self._changes.append(change_P)
            self.best_P, self._gradient_P = self.candidate_P, gradient_P
            self._step_P = self._downwards()
            gain = -0.5 * float(gradient_P @ self._step_P)
        else:
            self._step_P = SHORTER * self._step_P
        self.values.append(value)
        self.candidate_P = self.best_P + self._step_P
        self.is_over = gain <= LITTLE * min(self.values) or len(self.values) == PASSES

    def _downwards(self) -> Tensor:
        """The step that leads to the minimum, as far as gradients can tell; zeros if the gradient is zero."""
        step_P = -self._gradient_P
        if not self._steps:
            step_P = step_P / self._curvature_P
            size = step_P.square().mean().sqrt()
            return step_P * (FIRST_STEP / size) if size > 0 else step_P
        shares = []
        for along_P, change_P in zip(self._steps[::-1], self._changes[::-1], strict=True):
            shares.append((along_P @ step_P) / (along_P @ change_P))
            step_P = step_P - shares[-1] * change_P
        latest_P = self._changes[-1]
        factor = (self._steps[-1] @ latest_P) / (latest_P @ (latest_P / self._curvature_P))
        step_P = factor * step_P / self._curvature_P
        for along_P, change_P in zip(self._steps, self._changes, strict=True):
            step_P = step_P + along_P * (shares.pop() - (change_P @ step_P) / (along_P @ change_P))
        return step_P

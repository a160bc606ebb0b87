"""Sums over tokens that score units, reduced inside hooks so that no activation gradient outlives its layer.

A unit is one or more consecutive channels of what a layer's output projection reads (``hfprune_dist.structures``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.bound_losses import Batch, bind
from hfprune_dist.core.criteria import Criterion, Loss, losses_of
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.head import head_gradients
from hfprune_dist.core.memory_efficient import masked, observe_gradient


class NonFiniteError(ValueError):
    """Activations or gradients of a layer are NaN or infinite; the message says which."""


@dataclass(frozen=True)
class ScoredModel:
    """A frozen causal language model, as the calibration pass sees it.

    Attributes:
        body: input_ids [B, T] -> final hidden states [B, T, hidden_size], the final norm included.
        head: gives the head's weight [vocabulary, hidden_size] and bias, for as long as its context lasts.
        output_projections: one module per layer, in order; channels of their inputs are the units'.
        rearming: called after a forward; what it returns is called before each backward.
        student_LU: which units the student has, bool [num_layers, units] on the model's device; for losses of a student
            alone.
    """

    body: Callable[[Tensor], Tensor]
    head: Callable[[], AbstractContextManager[tuple[Tensor, Tensor | None]]]
    output_projections: Sequence[nn.Module]
    rearming: Callable[[], Callable[[], None]] = lambda: lambda: None
    student_LU: Tensor | None = None


def score_batch(model: ScoredModel, batch: Batch, sums: UnitSums) -> dict[str, float]:
    """Add a micro-batch's sums to ``sums``: one forward, one pass over the logits, one backward for each loss.

    Losses of a student cost all of that again. The dense model comes first and knows nothing of it.

    Returns:
        Loss name -> sum over the batch's windows of the loss per token.

    Raises:
        NonFiniteError: where a layer saw NaN or infinity.
    """
    losses = losses_of(sums.criteria)
    of_dense = [loss for loss in losses if loss.of == "dense"]
    of_student = [loss for loss in losses if loss.of == "student"]
    with sums.observe():
        with torch.set_grad_enabled(bool(of_dense)):
            hidden_BTC = model.body(batch.input_ids_BT)
        values = _differentiate(model, batch, sums, of_dense, hidden_BTC) if of_dense else {}
        if of_student:
            assert model.student_LU is not None
            with sums.masking(model.student_LU):
                student_BTC = model.body(batch.input_ids_BT)
                values |= _differentiate(model, batch, sums, of_student, student_BTC, teacher_BTC=hidden_BTC.detach())
    return values


def _differentiate(
    model: ScoredModel,
    batch: Batch,
    sums: UnitSums,
    losses: Sequence[Loss],
    hidden_BTC: Tensor,
    *,
    teacher_BTC: Tensor | None = None,
) -> dict[str, float]:
    """One pass over the logits of final hidden states, then one backward for each loss; returns the losses' values."""
    teacher_NC = None if teacher_BTC is None else teacher_BTC.flatten(0, 1)
    with model.head() as (weight_VC, bias_V):
        bound = [bind(loss, batch) for loss in losses]
        gradients = head_gradients(hidden_BTC.detach().flatten(0, 1), weight_VC, bias_V, bound, teacher_NC)
    return sums.backward(hidden_BTC, dict(zip(losses, gradients, strict=True)), model.rearming())


class UnitSums:
    """Accumulates a sum over tokens for every unit and criterion.

    ``h`` is the input of a layer's output projection. Of a gradient, what is added up is |x| or x^2, x the sum of
    h_n * dL/dh_n over the unit's channels n: the first-order effect of its removal. Of activations, it is |h_n| or
    h_n^2 of each channel: the root of a sum of squares is a norm. The gradient graph begins at the first layer's
    ``h``: nothing below it needs a gradient, and no parameter does. Use::

        with sums.observe():
            hidden = body(windows)  # under no_grad where no criterion has a loss
            sums.backward(hidden, head_gradients(...))  # where one has

    Args:
        output_projections: one module per layer, in order, all with as many channels of input.
        criteria: those with something to sum.
        channels_per_unit: consecutive channels that are one unit's.

    Attributes:
        criteria: as given.
        sums_KLU: float64 [criteria, num_layers, units] on the CPU; 0 for criteria whose sum ``is_rounded``.
        terms_JLU: of those criteria, in their order, what each micro-batch adds: one float32 tensor for each.
        curvature_LCC: float32 [num_layers, hidden_size, hidden_size] on the CPU, the sum over tokens of g g^T, g the
            gradient at the projection's output of the loss of the criterion that needs it; empty where none does.
    """

    def __init__(
        self, output_projections: Sequence[nn.Module], criteria: Sequence[Criterion], channels_per_unit: int
    ) -> None:
        self._modules = output_projections
        self._channels_per_unit = channels_per_unit
        self.criteria = criteria
        self._needs_gradient = any(criterion.loss for criterion in criteria)
        units = int(output_projections[0].in_features) // channels_per_unit  # type: ignore[arg-type]
        self.sums_KLU = torch.zeros(len(criteria), len(output_projections), units, dtype=torch.float64)
        self.terms_JLU: list[Tensor] = []
        self._rounded_J = [number for number, criterion in enumerate(criteria) if criterion.is_rounded]
        self._curvature_loss = next((criterion.loss for criterion in criteria if criterion.needs_moments), None)
        self.curvature_LCC = torch.zeros(0)
        if self._curvature_loss is not None:
            hidden_size = int(output_projections[0].out_features)  # type: ignore[arg-type]
            self.curvature_LCC = torch.zeros(len(output_projections), hidden_size, hidden_size, dtype=torch.float32)
        self._partial: dict[tuple[str, int], Tensor] = {}
        self._curvature: dict[int, Tensor] = {}
        self._activation_sum: dict[int, Tensor] = {}
        self._in_backward_of: Loss | None = None
        self._keeps_LU: Tensor | None = None

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Hook the modules for one forward and its backwards, then add what they saw to the sums.

        Raises:
            NonFiniteError: where a layer saw NaN or infinity; the sums are then left as they were.
        """
        handles = [
            module.register_forward_pre_hook(self._make_hook(layer), prepend=True)
            for layer, module in enumerate(self._modules)
        ]
        if self._curvature_loss is not None:
            handles += [
                module.register_forward_hook(self._make_output_hook(layer))
                for layer, module in enumerate(self._modules)
            ]
        try:
            yield
            self._absorb()
        finally:
            for handle in handles:
                handle.remove()
            self._partial.clear()
            self._curvature.clear()
            self._activation_sum.clear()

    @contextmanager
    def masking(self, keeps_LU: Tensor) -> Iterator[None]:
        """Inside ``observe``: forwards and their backwards are those of a student that has these units alone.

        All units are scored, at the activations that they would have: one that the student lacks by what its return
        would do to the loss.
        """
        self._keeps_LU = keeps_LU
        try:
            yield
        finally:
            self._keeps_LU = None

    def backward(
        self,
        hidden_BTC: Tensor,
        gradients: Mapping[Loss, tuple[Tensor, Tensor]],
        before_each: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """One backward for each loss through the graph of one forward, freed by the last.

        Args:
            hidden_BTC: final hidden states, with their graph.
            gradients: loss -> loss per token and the gradient of its sum at the hidden states, from the head.
            before_each: called before every backward.

        Returns:
            Loss name -> sum over windows of the loss per token.
        """
        values = {}
        for number, (loss, (loss_N, gradient_NC)) in enumerate(gradients.items(), start=1):
            terms = loss.terms(hidden_BTC.shape[1])
            gradient_BTC = gradient_NC.view_as(hidden_BTC)
            before_each()
            self._in_backward_of = loss
            hidden_BTC.backward(
                gradient_BTC / terms if loss.reduction == "mean" else gradient_BTC,
                retain_graph=number < len(gradients),
            )
            self._in_backward_of = None
            values[loss.name] = loss_N.sum(dtype=torch.float64).item() / terms
        return values

    def _make_hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def before_output_projection(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden_BTD,) = inputs
            is_first_run = self._in_backward_of is None  # else a checkpointed layer runs again
            if torch.is_grad_enabled() and not hidden_BTD.requires_grad:
                hidden_BTD = hidden_BTD.detach().requires_grad_()
            if self._keeps_LU is not None:
                keeps_D = self._keeps_LU[layer].repeat_interleave(self._channels_per_unit)
                hidden_BTD = masked(hidden_BTD, keeps_D)
            elif is_first_run:
                self._activation_sum[layer] = hidden_BTD.detach().sum()
                self._reduce_activation(layer, hidden_BTD.detach())
            if is_first_run and torch.is_grad_enabled():
                observe_gradient(hidden_BTD, partial(self._reduce_gradient, layer))
            return (hidden_BTD,)

        return before_output_projection

    def _make_output_hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_output_projection(_module: nn.Module, _inputs: tuple[Tensor, ...], output_BTC: Tensor) -> None:
            if output_BTC.requires_grad:
                output_BTC.register_hook(lambda gradient_BTC: self._reduce_output_gradient(layer, gradient_BTC))

        return after_output_projection

    def _reduce_output_gradient(self, layer: int, gradient_BTC: Tensor) -> None:
        if self._in_backward_of is self._curvature_loss:
            self._curvature[layer] = gram_matrix(_widened(gradient_BTC.flatten(0, -2))).cpu()

    def _reduce_activation(self, layer: int, hidden_BTD: Tensor) -> None:
        for criterion in self.criteria:
            if criterion.summed == "activation":
                sum_D = _sum_over_tokens(criterion, _widened(hidden_BTD).abs())
                self._partial[criterion.name, layer] = self._sum_over_channels(sum_D)

    def _reduce_gradient(self, layer: int, product_ND: Tensor) -> None:
        """Add some tokens' h * dL/dh to the sums of the micro-batch."""
        assert self._in_backward_of is not None, "a backward that is not ours"
        magnitude_NU = self._sum_over_channels(product_ND).abs_()
        for criterion in self.criteria:
            if criterion.loss is self._in_backward_of:
                sum_U = _sum_over_tokens(criterion, magnitude_NU)
                if (criterion.name, layer) in self._partial:
                    sum_U += self._partial[criterion.name, layer]
                self._partial[criterion.name, layer] = sum_U

    def _sum_over_channels(self, values_D: Tensor) -> Tensor:
        """Values of channels, in the last dimension, added up for each unit; as they are where each is a unit."""
        if self._channels_per_unit == 1:
            return values_D
        sums_U: Tensor = values_D.unflatten(-1, (-1, self._channels_per_unit)).sum(dim=-1)
        return sums_U

    def _absorb(self) -> None:
        """Add one micro-batch's float32 sums to the float64 ones."""
        layers = range(len(self._modules))
        partial_KLU = torch.stack(
            [torch.stack([self._partial[criterion.name, layer] for layer in layers]) for criterion in self.criteria]
        ).cpu()
        if not partial_KLU.isfinite().all():
            self._explain(partial_KLU)
        if self._rounded_J:
            self.terms_JLU.append(partial_KLU[self._rounded_J])
            partial_KLU[self._rounded_J] = 0.0
        self.sums_KLU += partial_KLU
        for layer, curvature_CC in self._curvature.items():
            self.curvature_LCC[layer] += curvature_CC

    def _explain(self, partial_KLU: Tensor) -> None:
        finite = [bool(self._activation_sum[layer].isfinite()) for layer in range(len(self._modules))]
        if not all(finite):
            raise NonFiniteError(f"activations of layer {finite.index(False)} are NaN or infinite")
        what = "gradients" if self._needs_gradient else "squared activations"
        lost = (~partial_KLU.isfinite().all(dim=2)).any(dim=0).nonzero().max().item()
        raise NonFiniteError(f"{what} of layer {lost} are NaN or infinite")


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum_over_tokens(criterion: Criterion, magnitude_BTD: Tensor) -> Tensor:
    terms_BTD = magnitude_BTD if criterion.reduction == "abs" else magnitude_BTD.square()
    return terms_BTD.flatten(0, -2).sum(dim=0)

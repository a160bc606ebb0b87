"""The work on one micro-batch of calibration: one forward, one pass over the logits, and one backward per loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hfprune_dist.core.criterion import Loss, losses_of
from hfprune_dist.core.head import IDENTITY, AfterHead, Batch, Outputs, head_gradients
from hfprune_dist.core.observers import UnitSums


@dataclass(frozen=True)
class ScoredModel:
    """A frozen causal language model, as the calibration pass sees it.

    Attributes:
        body: input_ids [B, T] -> final hidden states [B, T, hidden_size], the final norm included.
        head: returns a context that provides the head's weight [vocabulary, hidden_size] and bias while it lasts.
        after: transformation of the head's logits.
        before_backward: called after a forward; the function that it returns is called before each backward.
        student: for kinds of which the student lacks some units -> mask of those it has, bool [units] for each layer,
            on the model's device; used only by losses of a student.
    """

    body: Callable[[Tensor], Tensor]
    head: Callable[[], AbstractContextManager[tuple[Tensor, Tensor | None]]]
    after: AfterHead = IDENTITY
    before_backward: Callable[[], Callable[[], None]] = lambda: lambda: None
    student: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


def score_batch(model: ScoredModel, batch: Batch, sums: UnitSums) -> dict[str, float]:
    """Add a micro-batch to ``sums``, for all kinds of units in the same passes; return loss name -> sum over windows of
    their mean loss per token. If a layer saw NaN or infinity (NonFiniteError), the sums are unchanged.

    Losses of a student cost the same passes again. The dense model runs first and is unaffected by the student.
    """
    losses = losses_of(sums.criteria)
    of_dense = [loss for loss in losses if not loss.of_student]
    of_student = [loss for loss in losses if loss.of_student]
    values: dict[str, float] = {}
    with sums.observe():
        with torch.set_grad_enabled(bool(of_dense)):
            hidden_BTC = model.body(batch.input_ids_BT)
        if of_dense:
            values |= _differentiate(model, batch, sums, of_dense, hidden_BTC)
        if of_student:
            sums.phase.student = model.student
            student_BTC = model.body(batch.input_ids_BT)
            values |= _differentiate(model, batch, sums, of_student, student_BTC, hidden_BTC.detach().flatten(0, 1))
    return values


def _differentiate(
    model: ScoredModel,
    batch: Batch,
    sums: UnitSums,
    losses: Sequence[Loss],
    hidden_BTC: Tensor,
    teacher_NC: Tensor | None = None,
) -> dict[str, float]:
    """One pass over the logits, then each loss's backward through the graph of one forward; return the losses."""
    with model.head() as head:
        of_batch = [loss.of_batch(batch) for loss in losses]
        outputs = Outputs(hidden_BTC.detach().flatten(0, 1), *head, model.after)
        teacher = None if teacher_NC is None else replace(outputs, hidden_NC=teacher_NC)
        gradients = head_gradients(outputs, of_batch, teacher)
    before_each = model.before_backward()
    values: dict[str, tuple[Tensor, float]] = {}
    sums.phase.windows = len(hidden_BTC)
    for loss, (loss_N, gradient_NC) in zip(losses, gradients, strict=True):
        terms = hidden_BTC.shape[1] - loss.unlabelled
        gradient_BTC = gradient_NC.view_as(hidden_BTC)
        before_each()
        sums.phase.backward_of = loss
        hidden_BTC.backward(gradient_BTC / terms if loss.is_mean else gradient_BTC, retain_graph=loss is not losses[-1])
        sums.phase.backward_of = None
        values[loss.name] = loss_N.sum(dtype=torch.float64), terms
    # Only now, or each backward would begin when the one before it is over, rather than queued behind it.
    totals = torch.stack([total for total, _ in values.values()]).tolist()
    return {name: total / terms for total, (name, (_, terms)) in zip(totals, values.items(), strict=True)}

"""The work on one micro-batch of calibration: one forward, one pass over the logits, and one backward per loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hfprune_dist.core.criterion import Criterion, Loss, losses_of
from hfprune_dist.core.head import NOTHING, AfterHead, Batch, head_gradients
from hfprune_dist.core.linear_observer import LinearObserver, Phase, SeenLinear
from hfprune_dist.core.observers import KindObserver, SeeOutputGradients, UnitOutputs


@dataclass(frozen=True)
class ScoredModel:
    """A frozen causal language model, as the calibration pass sees it.

    Attributes:
        body: input_ids [B, T] -> final hidden states [B, T, hidden_size], the final norm included.
        head: returns a context that provides the head's weight [vocabulary, hidden_size] and bias while it lasts.
        outputs: kind -> the modules at which its units are observed.
        after: transformation of the head's logits.
        before_backward: called after a forward; the function that it returns is called before each backward.
        student: for kinds of which the student lacks some units -> mask of those it has, bool [units] for each layer,
            on the model's device; used only by losses of a student.
    """

    body: Callable[[Tensor], Tensor]
    head: Callable[[], AbstractContextManager[tuple[Tensor, Tensor | None]]]
    outputs: Mapping[str, UnitOutputs]
    after: AfterHead = NOTHING
    before_backward: Callable[[], Callable[[], None]] = lambda: lambda: None
    student: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


def score_batch(model: ScoredModel, batch: Batch, sums: UnitSums) -> dict[str, float]:
    """Add a micro-batch to ``sums``, for all kinds of units in the same passes.

    Losses of a student cost the same passes again. The dense model runs first and is unaffected by the student.

    Returns:
        Loss name -> sum over the batch's windows of the loss per token.

    Raises:
        NonFiniteError: if a layer saw NaN or infinity; the sums are then unchanged.
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
            # All units are observed at the activations that they would have, also those that the student lacks.
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
    """Run one pass over the logits, then one backward for each loss; return the losses' values."""
    with model.head() as (weight_VC, bias_V):
        of_batch = [loss.of_batch(batch) for loss in losses]
        hidden_NC = hidden_BTC.detach().flatten(0, 1)
        gradients = head_gradients(hidden_NC, weight_VC, bias_V, of_batch, teacher_NC, after=model.after)
    return sums.backward(hidden_BTC, dict(zip(losses, gradients, strict=True)), model.before_backward())


class UnitSums:
    """Sums over tokens for every unit and criterion, accumulated for all kinds of units in the same passes.

    The gradient graph begins at the first ``h`` of any kind, or at the first of ``linears``: nothing below it needs a
    gradient, and no parameter does. Scoring further kinds changes no bits of the others' sums.

    Args:
        outputs: kind -> the modules at which its units are observed.
        criteria: the criteria that observe something.
        see_output_gradients: kind -> callback for the gradients at the outputs of its output projections.
        linears: linear layers whose weights' gradients are observed, if a criterion needs them.

    Attributes:
        phase: the current state of the pass.
    """

    def __init__(
        self,
        outputs: Mapping[str, UnitOutputs],
        criteria: Sequence[Criterion],
        see_output_gradients: Mapping[str, SeeOutputGradients] | None = None,
        linears: Sequence[SeenLinear] = (),
    ) -> None:
        self.criteria = criteria
        self.phase = Phase()
        see = see_output_gradients or {}
        self._kinds = {
            kind: KindObserver(kind, it, criteria, self.phase, see.get(kind)) for kind, it in outputs.items()
        }
        losses = losses_of(criterion for criterion in criteria if criterion.observes == "weight_gradients")
        self._linear_observers = [LinearObserver(linears, loss, self.phase) for loss in losses]
        self._linear_observers += [it for of_kind in self._kinds.values() for it in of_kind.linear_observers()]

    @property
    def kinds(self) -> dict[str, dict[str, Tensor]]:
        """Kind -> criterion -> sums over all micro-batches so far, as ``KindObserver.sums``."""
        return {kind: observer.sums for kind, observer in self._kinds.items()}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Hook the modules for one forward and its backwards, then add what they saw to the sums."""
        observers = self._kinds.values()
        handles = [handle for observer in observers for handle in observer.hook()]
        handles += [handle for observer in self._linear_observers for handle in observer.hook()]
        try:
            yield
            taken = [observer.take() for observer in observers]
            for observer, of_kind in zip(observers, taken, strict=True):
                for name, sums_LN in of_kind.items():
                    observer.sums[name] += sums_LN
        finally:
            self.phase.student = None
            for handle in handles:
                handle.remove()
            for observer in observers:
                observer.forget()

    def backward(
        self,
        hidden_BTC: Tensor,
        gradients: Mapping[Loss, tuple[Tensor, Tensor]],
        before_each: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """Run one backward for each loss through the graph of one forward, which the last one frees.

        Args:
            hidden_BTC: final hidden states, with their graph.
            gradients: loss -> loss per token and the gradient of its sum at the hidden states, from the head.

        Returns:
            Loss name -> sum over windows of the loss per token.
        """
        sums: dict[str, tuple[Tensor, float]] = {}
        self.phase.windows = len(hidden_BTC)
        for number, (loss, (loss_N, gradient_NC)) in enumerate(gradients.items(), start=1):
            terms = hidden_BTC.shape[1] - loss.unlabelled
            gradient_BTC = gradient_NC.view_as(hidden_BTC)
            before_each()
            self.phase.backward_of = loss
            hidden_BTC.backward(
                gradient_BTC / terms if loss.is_mean else gradient_BTC, retain_graph=number < len(gradients)
            )
            self.phase.backward_of = None
            sums[loss.name] = loss_N.sum(dtype=torch.float64), terms
        # Only now, or each backward would begin when the one before it is over, rather than queued behind it.
        return {name: total.item() / terms for name, (total, terms) in sums.items()}

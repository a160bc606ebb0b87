"""SDMPrune: neurons go that matter least, by weight times gradient, to the loss of a student that already lacks a few
neurons and has the dense model as its teacher (Zhu et al. 2025, arXiv 2506.11120).

Neuron n of a gated MLP has three weights at hidden channel j: gate_nj, up_nj and down_jn. Removing all three at once
lowers the loss, to first order, by the sum of their W * dL/dW, in which products of opposite sign cancel. The score is
the sum over windows of the mean over j of that sum's absolute value.

``coupled_taylor``, a first pass, has the loss on the text's next tokens. A student lacks the few neurons of each layer
that score lowest by it. ``coupled_taylor_distilled`` scores the student with L = (1 - a) CE + a KL(dense || student),
in which the dense model's logits are divided by a temperature. The student is a mask; what it lacks scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfprune_dist.core.criterion import Criterion, Loss
from hfprune_dist.methods.llm_pruner import CROSS_ENTROPY
from hfprune_dist.structures import NEURONS

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.core.head import Batch, LogitGradient, Rows
    from hfprune_dist.core.linear_observer import OwnedRows

# Share of each layer's neurons that the student lacks.
LACKS = 0.025
# Ratio -> a and the temperature (the code's settings for Llama-3.2-1B).
PUBLISHED = {0.2: (0.4, 0.2), 0.3: (0.42, 0.5), 0.4: (0.1, 0.2)}
# Bytes per element of a block of weights, in float32: the products, and what is added to or multiplied with them.
BLOCK_BYTES = 2 * 4


def coupled_products(owned: Sequence[OwnedRows]) -> Tensor:
    """Sum over a micro-batch's windows of the mean over hidden channels of |sum of W * dL/dW over a neuron's weights
    there|, in blocks of neurons, so that no weight's whole gradient ever exists.
    """
    from hfprune_dist.core.portions import row_blocks, wide_dtype, wide_product

    weight_DC, inputs_BTC, _ = owned[0]
    scores_U = weight_DC.new_zeros(len(weight_DC), dtype=wide_dtype(weight_DC.dtype))
    for window in range(len(inputs_BTC)):
        for rows in row_blocks(weight_DC, BLOCK_BYTES):
            gradients = (wide_product(g_BTD[window, :, rows], x_BTC[window]) for _, x_BTC, g_BTD in owned)
            products = (gradient.mul_(part.weight_DC[rows]) for gradient, part in zip(gradients, owned, strict=True))
            of_neurons = next(products)
            for product in products:
                of_neurons += product
            scores_U[rows] += of_neurons.abs_().mean(dim=1)
    return scores_U


def lacking(neurons: int, share: float) -> int:
    """The number of a layer's neurons that a student lacks."""
    return round(share * neurons)


def student_keeps(scores_U: Tensor, share: float) -> Tensor:
    """Mask of a layer's neurons that the student has, bool: all but the share with the lowest first-pass scores."""
    lacks = scores_U.sort(stable=True).indices[: lacking(len(scores_U), share)]
    return scores_U.new_ones(len(scores_U)).bool().index_fill_(0, lacks, value=False)


def labels_and_teacher(batch: Batch) -> LogitGradient:
    """Return a function of some tokens' logits, the student's and the teacher's: L of each token, and its gradient.

    The mean over a window's labels, one fewer than its tokens, is scaled so that the mean over all tokens gives L.
    """
    from hfprune_dist.core.losses import cross_entropy_gradient, distillation_gradient

    assert batch.teacher is not None
    (share, temperature), tokens, labels_N = batch.teacher, batch.input_ids_BT.shape[1], batch.labels()
    of_labels = (1 - share) * tokens / (tokens - CROSS_ENTROPY.unlabelled)

    def gradient(rows: Rows) -> tuple[Tensor, Tensor]:
        assert rows.teacher_NV is not None
        ce_N, ce_gradient_NV = cross_entropy_gradient(rows.logits_NV.clone(), labels_N[rows.numbers])
        kl_N, kl_gradient_NV = distillation_gradient(rows.logits_NV, rows.teacher_NV.div_(temperature))
        loss_N = ce_N.mul_(of_labels).add_(kl_N, alpha=share)
        return loss_N, ce_gradient_NV.mul_(of_labels).add_(kl_gradient_NV, alpha=share)

    return gradient


LABELS_AND_TEACHER = Loss("labels_and_teacher", labels_and_teacher, of_student=True)

CRITERIA = (
    Criterion("coupled_taylor", frozenset({NEURONS}), "weights", coupled_products, loss=CROSS_ENTROPY),
    Criterion(
        "coupled_taylor_distilled",
        frozenset({NEURONS}),
        "weights",
        coupled_products,
        loss=LABELS_AND_TEACHER,
        student_by="coupled_taylor",
    ),
)

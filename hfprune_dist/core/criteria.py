"""The criteria by which neurons are scored. README.md beside this file explains how to add one to ``CRITERIA``.

``h`` is the vector that an MLP's down projection reads; a neuron is one of its channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hfprune_dist.core.elimination import elimination_scores
from hfprune_dist.core.entropy import entropy_gradient
from hfprune_dist.core.fidelity import next_ids
from hfprune_dist.core.head import LogitGradient, Rows
from hfprune_dist.core.losses import (
    SIGN_TOKENS,
    cross_entropy_gradient,
    distillation_gradient,
    draw_sign_bits,
    draw_uniform,
    random_signs_gradient,
    sampled_label_gradient,
    signs_of,
)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of calibration windows, as losses see it.

    Attributes:
        input_ids_BT: int64 [windows, tokens], on the model's device.
        windows: each window's number among all of the calibration's.
        vocabulary: number of logits of a token.
        seed: the sweep's.
    """

    input_ids_BT: Tensor
    windows: Sequence[int]
    vocabulary: int
    seed: int

    def draw(self, of_window: Callable[[int], Tensor]) -> Tensor:
        """Random numbers of each window, one window after another, on the model's device."""
        return torch.cat([of_window(window) for window in self.windows]).to(self.input_ids_BT.device)


# What of a layer's neurons the student of ``self_distillation`` does without. SDMPrune's code takes 1/40; on a model of
# 135M parameters a tenth leaves 0.13 nats of divergence, a hundred times what rounding to bfloat16 does.
STUDENT_LACKS = 0.1
# The criterion that says which. Not ``magnitude``: without the 1/40 of smallest norm that model diverges by 3.8 nats.
STUDENT_CRITERION = "activation"


@dataclass(frozen=True)
class Loss:
    """A function of a model's outputs, whose gradient scores neurons. Criteria of one loss share one backward.

    Attributes:
        name: for reports.
        bind: batch -> the loss per token of rows of that batch, and its gradient at their logits.
        reduction: what is differentiated is a window's mean or sum over its tokens.
        of: whose outputs: the dense model's, or those of a student that lacks some neurons, with the dense model as its
            teacher. Neurons are scored at the activations of that same model.
        unlabelled: tokens at the end of a window that have no loss.
        in_nats: its mean per token is a quantity worth reporting.
    """

    name: str
    bind: Callable[[Batch], LogitGradient]
    reduction: Literal["mean", "sum"]
    of: Literal["dense", "student"] = "dense"
    unlabelled: int = 0
    in_nats: bool = True

    def terms(self, tokens: int) -> int:
        """Of a window of so many tokens, those that have a loss."""
        return tokens - self.unlabelled


@dataclass(frozen=True)
class SecondMoments:
    """Second moments of one layer over the calibration tokens.

    Attributes:
        gram_DD: float64, the mean of h h^T.
        curvature_CC: float64, the mean of g g^T, g the gradient of the criterion's loss at the MLP's output.
        tokens: how many.
    """

    gram_DD: Tensor
    curvature_CC: Tensor
    tokens: int


@dataclass(frozen=True)
class MlpLayer:
    """One layer's MLP: what scores beyond the calibration pass are made from. Weights are read when asked for.

    Attributes:
        number: of the layer.
        intermediate_size: its neurons.
        seed: the sweep's.
        read_rows: -> weights of the row projections, each [intermediate_size, hidden_size].
        read_column: -> weight of the down projection [hidden_size, intermediate_size].
        moments: what a criterion that ``needs_moments`` gets to see.
    """

    number: int
    intermediate_size: int
    seed: int
    read_rows: Callable[[], list[Tensor]]
    read_column: Callable[[], Tensor]
    moments: SecondMoments | None = None


def the_sum(sum_D: Tensor, _layer: MlpLayer) -> Tensor:
    """What a score is where nothing is done to the sum."""
    return sum_D


@dataclass(frozen=True)
class Criterion:
    """A score per neuron: a sum over all tokens of the calibration pass, then perhaps something done to that sum.

    Attributes:
        name: in the configuration and in the artifact.
        description: one line, with the source.
        summed: per token, h * dL/dh ("gradient"), h itself ("activation"), or "nothing": no calibration pass.
        loss: L, where a gradient is summed.
        reduction: the sum is one of absolute values or of squares.
        needs_moments: ``finish`` looks at the layer's ``SecondMoments``, which cost a second pass over the windows.
        in_nats: scores are estimates of KL divergence per token, which layers share as a unit.
        accumulated_in: dtype of the running sum over micro-batches. A narrower one than float64 is for comparison with
            code that adds up in it: the sum is then rounded after each micro-batch, in the order of the whole pass.
        finish: sum [intermediate_size], layer -> scores [intermediate_size], both float64 on the CPU; by default the
            sum itself.
    """

    name: str
    description: str
    summed: Literal["gradient", "activation", "nothing"]
    loss: Loss | None = None
    reduction: Literal["abs", "square"] = "abs"
    needs_moments: bool = False
    in_nats: bool = False
    accumulated_in: torch.dtype = torch.float64
    finish: Callable[[Tensor, MlpLayer], Tensor] = the_sum

    def __post_init__(self) -> None:
        assert (self.summed == "gradient") == (self.loss is not None), self.name

    @property
    def is_rounded(self) -> bool:
        """Whether its running sum loses bits, so that it can't be added up shard by shard."""
        return self.accumulated_in != torch.float64

    @property
    def has_halves(self) -> bool:
        """Whether what two halves of the windows add up to can be set against each other (see ``core.split_half``).

        Rounded sums have no halves that would tell anything: the more terms, the more of them vanish, so two halves
        lose less than the whole, and the whole stops changing because of the rounding.
        """
        return self.summed != "nothing" and not self.is_rounded

    @property
    def compared(self) -> str:
        """What is compared of two halves: scores, or the sums over tokens where a score is more than its sum."""
        if self.finish is the_sum:
            return "scores"
        term = "(h * dL/dh)" if self.summed == "gradient" else "h"
        return f"sums of |{term}|" if self.reduction == "abs" else f"sums of {term}^2"


def losses_of(criteria: Sequence[Criterion]) -> list[Loss]:
    """The losses that some criteria need, each once: one backward for each, and a forward more for a student's."""
    return list(dict.fromkeys(criterion.loss for criterion in criteria if criterion.loss is not None))


def _entropy(_batch: Batch) -> LogitGradient:
    return lambda rows: entropy_gradient(rows.logits_NV)


def _cross_entropy(batch: Batch) -> LogitGradient:
    labels_N = torch.cat([next_ids(input_ids_T) for input_ids_T in batch.input_ids_BT])
    return lambda rows: cross_entropy_gradient(rows.logits_NV, labels_N[rows.numbers])


def _sampled_label(batch: Batch) -> LogitGradient:
    tokens = batch.input_ids_BT.shape[1]
    uniform_N = batch.draw(lambda window: draw_uniform(batch.seed, window, tokens))
    return lambda rows: sampled_label_gradient(rows.logits_NV, uniform_N[rows.numbers])


def _random_signs(batch: Batch) -> LogitGradient:
    tokens, device = batch.input_ids_BT.shape[1], batch.input_ids_BT.device

    @functools.lru_cache(maxsize=1)  # rows come in order, a few at a time
    def bits_of(window: int, group: int) -> Tensor:
        return draw_sign_bits(batch.seed, window, group, batch.vocabulary).to(device)

    def gradient(rows: Rows) -> tuple[Tensor, Tensor]:
        drawn = _sign_groups(rows.numbers, tokens)
        bits_NB = torch.cat([bits_of(batch.windows[place], group)[some] for place, group, some in drawn])
        return random_signs_gradient(rows.logits_NV, signs_of(bits_NB, batch.vocabulary, rows.logits_NV.dtype))

    return gradient


def _sign_groups(numbers: slice, tokens: int) -> Iterator[tuple[int, int, slice]]:
    """Where signs of some of a batch's tokens are: the window's place in the batch, the group, and which of it."""
    start = numbers.start
    while start < numbers.stop:
        place, token = divmod(start, tokens)
        group, first = divmod(token, SIGN_TOKENS)
        count = min(numbers.stop - start, tokens - token, SIGN_TOKENS - first)
        yield place, group, slice(first, first + count)
        start += count


def _self_distillation(_batch: Batch) -> LogitGradient:
    def gradient(rows: Rows) -> tuple[Tensor, Tensor]:
        assert rows.teacher_NV is not None
        return distillation_gradient(rows.logits_NV, rows.teacher_NV)

    return gradient


ENTROPY = Loss("entropy", _entropy, "mean")
CROSS_ENTROPY = Loss("cross_entropy", _cross_entropy, "mean", unlabelled=1)
# Fisher losses stay sums: the gradients of different tokens' losses are then uncorrelated terms of one sum, whose
# square has the sum of their squares as its expectation.
SAMPLED_LABEL = Loss("sampled_label", _sampled_label, "sum")
RANDOM_SIGNS = Loss("random_signs", _random_signs, "sum", in_nats=False)
SELF_DISTILLATION = Loss("self_distillation", _self_distillation, "mean", of="student")


def student_keeps(scores_D: Tensor) -> Tensor:
    """Which neurons of a layer the student has, bool [intermediate_size]: all but the tenth that scores least.

    Args:
        scores_D: by ``STUDENT_CRITERION``.
    """
    lacks = scores_D.sort(stable=True).indices[: round(STUDENT_LACKS * len(scores_D))]
    return torch.ones(len(scores_D), dtype=torch.bool).index_fill_(0, lacks, False)


def times_column_norm(sum_D: Tensor, layer: MlpLayer) -> Tensor:
    """||h_n|| * ||W_down[:, n]||, from the sum of h_n^2 over tokens (Wanda-sp: An et al. 2023, arXiv 2312.11983)."""
    return sum_D.sqrt() * _norm(layer.read_column(), dim=0)


def weight_norm(_sum_D: Tensor, layer: MlpLayer) -> Tensor:
    """Euclidean norm of all weights that a neuron owns, its rows and its column; biases don't count."""
    norms = [_norm(weight_DC, dim=1) for weight_DC in layer.read_rows()] + [_norm(layer.read_column(), dim=0)]
    return torch.stack(norms).square().sum(dim=0).sqrt()


def random_scores(_sum_D: Tensor, layer: MlpLayer) -> Tensor:
    """Uniform in [0, 1), decided by the seed and the layer's number."""
    generator = torch.Generator().manual_seed(layer.seed * 2**16 + layer.number)
    return torch.rand(layer.intermediate_size, generator=generator, dtype=torch.float64)


def costs_of_removal(sum_D: Tensor, layer: MlpLayer) -> Tensor:
    """KL divergence that each removal costs after all cheaper ones, the other neurons taking over (``elimination``)."""
    assert layer.moments is not None
    moments = layer.moments
    return elimination_scores(moments.gram_DD, moments.curvature_CC, layer.read_column(), sum_D / moments.tokens).cpu()


def _norm(weight: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64)
    return norms


# A Fisher score is sum_s (h_s * d/dh_s sum_t log p(y_t))^2 over the tokens s of a window. Attention mixes tokens: the
# gradient at token s holds the effect on every later token t. With labels drawn independently, terms of different t
# are uncorrelated, so the expected score is sum_s sum_t E[(h_s * dlog p(y_t)/dh_s)^2]: twice the second-order KL of
# removing the neuron at one token, added up over tokens. Products between tokens s of the neuron are left out.
CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "entropy",
            "sum over tokens of |h * dH/dh|, H a window's mean entropy (HFPrune, arXiv 2603.08083)",
            "gradient",
            ENTROPY,
        ),
        # The published code has one window in every micro-batch, and rounds the sum over its tokens on the way as well.
        Criterion(
            "entropy_bfloat16",
            "as entropy, but the sum over micro-batches is kept in bfloat16, as the published code keeps it over "
            "windows: what adds less than 1/256 vanishes",
            "gradient",
            ENTROPY,
            accumulated_in=torch.bfloat16,
        ),
        Criterion(
            "entropy_squared",
            "sum over tokens of (h * dH/dh)^2, from the gradients of entropy",
            "gradient",
            ENTROPY,
            "square",
        ),
        Criterion(
            "cross_entropy",
            "sum over tokens of |h * dCE/dh|, CE a window's mean over the text's next tokens (LLM-Pruner's first "
            "order, arXiv 2305.11627)",
            "gradient",
            CROSS_ENTROPY,
        ),
        Criterion(
            "fisher",
            "sum over tokens of (h * dlog p(y)/dh)^2, labels y drawn from the model's p",
            "gradient",
            SAMPLED_LABEL,
            "square",
        ),
        Criterion(
            "fisher_signs",
            "the same expectation as fisher, from random signs on the square root of p instead of labels",
            "gradient",
            RANDOM_SIGNS,
            "square",
        ),
        Criterion(
            "self_distillation",
            "sum over tokens of |h * dKL/dh| in a student without the tenth of neurons that are active least, KL a "
            "window's mean divergence from the dense model (SDMPrune, arXiv 2506.11120)",
            "gradient",
            SELF_DISTILLATION,
        ),
        Criterion(
            "activation",
            "norm of h over tokens times the norm of the neuron's down_proj column (Wanda-sp, arXiv 2312.11983)",
            "activation",
            reduction="square",
            finish=times_column_norm,
        ),
        Criterion(
            "surgeon",
            "nats per token that removing the neuron costs after all cheaper ones, when the others are refitted "
            "(K-FAC, arXiv 2312.17244)",
            "gradient",
            RANDOM_SIGNS,
            "square",
            needs_moments=True,
            in_nats=True,
            finish=costs_of_removal,
        ),
        Criterion("magnitude", "norm of the neuron's weights", "nothing", finish=weight_norm),
        Criterion("random", "a random order, the floor of any comparison", "nothing", finish=random_scores),
    )
}

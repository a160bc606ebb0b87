"""Losses of ``core.criteria`` bound to batches of calibration windows: their values per token, and their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.criteria import (
    CROSS_ENTROPY,
    ENTROPY,
    LABELS_AND_TEACHER,
    RANDOM_SIGNS,
    SAMPLED_LABEL,
    Loss,
)
from hfprune_dist.core.entropy import entropy_gradient
from hfprune_dist.core.fidelity import next_ids
from hfprune_dist.core.head import LogitGradient, Rows
from hfprune_dist.core.losses import (
    SIGN_TOKENS,
    cross_entropy_gradient,
    draw_sign_bits,
    draw_uniform,
    labels_and_teacher_gradient,
    random_signs_gradient,
    sampled_label_gradient,
    signs_of,
)


@dataclass(frozen=True)
class TeacherSettings:
    """Settings of a student's loss on labels and on a teacher.

    Attributes:
        share: weight of the teacher in the loss, in [0, 1]; the rest is that of the labels.
        temperature: number by which the teacher's logits, and only they, are divided.
    """

    share: float
    temperature: float


@dataclass(frozen=True)
class Batch:
    """A micro-batch of calibration windows, as losses see it.

    Attributes:
        input_ids_BT: int64 [windows, tokens], on the model's device.
        windows: each window's number among all calibration windows.
        vocabulary: number of logits per token.
        seed: the sweep's seed.
        teacher: settings for the losses of a student that also has labels.
    """

    input_ids_BT: Tensor
    windows: Sequence[int]
    vocabulary: int
    seed: int
    teacher: TeacherSettings | None = None

    def draw(self, of_window: Callable[[int], Tensor]) -> Tensor:
        """Concatenate the random numbers of all windows, on the model's device."""
        return torch.cat([of_window(window) for window in self.windows]).to(self.input_ids_BT.device)


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
    """Yield where the signs of a batch's tokens are: the window's place in the batch, the group, and a slice of it."""
    start = numbers.start
    while start < numbers.stop:
        place, token = divmod(start, tokens)
        group, first = divmod(token, SIGN_TOKENS)
        count = min(numbers.stop - start, tokens - token, SIGN_TOKENS - first)
        yield place, group, slice(first, first + count)
        start += count


def _labels_and_teacher(batch: Batch) -> LogitGradient:
    """(1 - a) times the mean over a window's labels, plus a times the mean over all its tokens; returned per token, and
    scaled so that the mean over all tokens gives this sum.
    """
    teacher, tokens = batch.teacher, batch.input_ids_BT.shape[1]
    assert teacher is not None
    labels_N = torch.cat([next_ids(input_ids_T) for input_ids_T in batch.input_ids_BT])
    of_labels = (1 - teacher.share) * tokens / CROSS_ENTROPY.terms(tokens)

    def gradient(rows: Rows) -> tuple[Tensor, Tensor]:
        assert rows.teacher_NV is not None
        some_N = labels_N[rows.numbers]
        shares_N = (some_N >= 0).to(rows.logits_NV.dtype).mul_(of_labels)
        tempered_NV = rows.teacher_NV.div_(teacher.temperature)
        return labels_and_teacher_gradient(rows.logits_NV, tempered_NV, shares_N, some_N, teacher_share=teacher.share)

    return gradient


_BINDINGS: dict[Loss, Callable[[Batch], LogitGradient]] = {
    ENTROPY: _entropy,
    CROSS_ENTROPY: _cross_entropy,
    SAMPLED_LABEL: _sampled_label,
    RANDOM_SIGNS: _random_signs,
    LABELS_AND_TEACHER: _labels_and_teacher,
}


def bind(loss: Loss, batch: Batch) -> LogitGradient:
    """Return the function that computes, for rows of a batch, the loss per token and its gradient at their logits."""
    return _BINDINGS[loss](batch)

"""Losses on a model's output distribution p = softmax(z), each with its gradient at the logits z in closed form.

They take float32 or float64 logits [tokens, vocabulary], which they overwrite, and return in the same dtype the loss of
each token [tokens], in nats but for random signs, and its gradient [tokens, vocabulary]. Words with logit -inf, as of a
padded vocabulary, add nothing to either: 0 log 0 = 0.

Random numbers depend on the sweep's seed and the window's number alone: chunks of tokens, micro-batches and ranks don't
change them. A CPU draws signs from a Mersenne Twister, which other devices don't have: they make theirs by counting, so
that nothing waits for the host. Both are fair coins, but other ones.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hfprune_dist.core.devices import send
from hfprune_dist.core.head import Batch, LogitGradient, Outputs, Rows, head_gradients
from hfprune_dist.core.portions import wide_dtype

# Number of tokens whose signs are drawn at a time, so that the bits of a long window never all exist at once.
SIGN_TOKENS = 64


def entropy_gradient(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's entropy and its gradient: dH/dz = -p * (log p + H) = p * (sum_v p_v z_v - z)."""
    shifted_NV = logits_NV.sub_(logits_NV.amax(dim=-1, keepdim=True)).clamp_(min=torch.finfo(logits_NV.dtype).min)
    weight_NV = shifted_NV.exp()
    total_N = weight_NV.sum(dim=-1)
    mean_N = torch.linalg.vecdot(weight_NV, shifted_NV).div_(total_N)
    gradient_NV = shifted_NV.sub_(mean_N[:, None]).mul_(weight_NV).mul_(total_N.reciprocal().neg_()[:, None])
    return total_N.log().sub_(mean_N), gradient_NV


def cross_entropy_gradient(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return -log p(label) and its gradient p - onehot(label); both are 0 for tokens without a label, int64 -1."""
    has_label_N1 = (labels_N >= 0)[:, None]
    labels_N1 = labels_N.clamp(min=0)[:, None]
    shifted_NV = logits_NV.sub_(logits_NV.amax(dim=-1, keepdim=True))
    label_logits_N1 = shifted_NV.gather(1, labels_N1)
    weight_NV = shifted_NV.exp_()
    total_N1 = weight_NV.sum(dim=-1, keepdim=True)
    # A row without a label is multiplied by 0 instead of 1 / total.
    gradient_NV = weight_NV.mul_(has_label_N1 / total_N1)
    gradient_NV.scatter_add_(1, labels_N1, -has_label_N1.to(gradient_NV.dtype))
    loss_N1 = total_N1.log().sub_(label_logits_N1).mul_(has_label_N1)
    return loss_N1.squeeze(1), gradient_NV


def random_signs_gradient(logits_NV: Tensor, signs_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return 2 sum_v e_v sqrt(p_v) and its gradient sqrt(p) * e - p * (sqrt(p) . e), for independent signs e = +-1.

    The loss means nothing by itself. But over e, its gradient g has E[g g^T] = diag(p) - p p^T: the exact Fisher
    matrix, as for a sampled label; only g spreads over the vocabulary what a label concentrates on one word. The signs,
    in the dtype of the logits, are overwritten, too.
    """
    log_p_NV = torch.sub(logits_NV, torch.logsumexp(logits_NV, dim=-1, keepdim=True), out=logits_NV)
    root_p_NV = log_p_NV.mul_(0.5).exp_()
    dot_N = torch.linalg.vecdot(root_p_NV, signs_NV)
    gradient_NV = signs_NV.addcmul_(root_p_NV, dot_N[:, None], value=-1).mul_(root_p_NV)
    return 2 * dot_N, gradient_NV


def distillation_gradient(logits_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || model) = sum_v p_v log(p_v / q_v) and its gradient at the model's logits, q - p. The
    teacher's logits t, p = softmax(t), have the dtype of the model's, and are overwritten, too.
    """
    log_q_NV = logits_NV.sub_(torch.logsumexp(logits_NV, dim=-1, keepdim=True))
    log_p_NV = teacher_NV.sub_(torch.logsumexp(teacher_NV, dim=-1, keepdim=True))
    p_NV = log_p_NV.exp()
    loss_N = torch.linalg.vecdot(p_NV, log_p_NV.sub_(log_q_NV).masked_fill_(p_NV == 0, 0.0))
    return loss_N, log_q_NV.exp_().sub_(p_NV)


def random_signs_of(batch: Batch) -> LogitGradient:
    """Return a function of some rows of a batch: their ``random_signs_gradient``, with each window's own signs."""
    bits_of = _drawn_bits(batch) if batch.input_ids_BT.device.type == "cpu" else _counted_bits(batch)

    def gradient(rows: Rows) -> tuple[Tensor, Tensor]:
        signs_NV = signs_of(bits_of(rows.numbers), batch.vocabulary, rows.logits_NV.dtype)
        return random_signs_gradient(rows.logits_NV, signs_NV)

    return gradient


def _drawn_bits(batch: Batch) -> Callable[[slice], Tensor]:
    """Return a function of rows of a batch: random bits for every word, as ``draw_sign_bits`` packs them."""
    tokens = batch.input_ids_BT.shape[1]

    @functools.lru_cache(maxsize=1)  # rows come in order, a few at a time
    def bits_of(window: int, group: int) -> Tensor:
        return draw_sign_bits(batch.seed, window, group, batch.vocabulary)

    def of_rows(numbers: slice) -> Tensor:
        bits, start = [], numbers.start
        while start < numbers.stop:
            place, token = divmod(start, tokens)
            group, first = divmod(token, SIGN_TOKENS)
            count = min(numbers.stop - start, tokens - token, SIGN_TOKENS - first)
            bits.append(bits_of(batch.windows[place], group)[first : first + count])
            start += count
        return torch.cat(bits)

    return of_rows


def _counted_bits(batch: Batch) -> Callable[[slice], Tensor]:
    """Return such a function for devices other than CPUs, with other bits: 64 at a time, by hashing their place."""
    tokens, device = batch.input_ids_BT.shape[1], batch.input_ids_BT.device
    digests = [_digest(batch.seed, window, "signs") for window in batch.windows]
    keys_B = send(torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests]), device)
    words_W = torch.arange(-(-batch.vocabulary // 64), device=device)

    def of_rows(numbers: slice) -> Tensor:
        rows_N1 = torch.arange(numbers.start, numbers.stop, device=device)[:, None]
        places_NW = rows_N1 % tokens * len(words_W) + words_W
        return split_mix(keys_B[rows_N1 // tokens], places_NW).view(torch.uint8)

    return of_rows


def split_mix(key: Tensor, places: Tensor) -> Tensor:
    """Return random numbers at ``places`` of a key's sequence, from 0 on: SplitMix64 (Steele et al. 2014), int64."""
    mixed = key + (places + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    return mixed ^ _shifted(mixed, 31)


def _shifted(number: Tensor, places: int) -> Tensor:
    return number >> places & (1 << 64 - places) - 1  # without copies of the sign


def draw_sign_bits(seed: int, window: int, group: int, vocabulary: int) -> Tensor:
    """Draw random bits for every word at ``SIGN_TOKENS`` tokens of a calibration window, packed into bytes on the CPU:
    uint8 [SIGN_TOKENS, bytes]. The first of these tokens is number ``group * SIGN_TOKENS`` of the window.
    """
    words = torch.empty(SIGN_TOKENS, -(-vocabulary // 64), dtype=torch.int64)
    generator = numbered_generator(seed, window, f"signs {group}")
    return words.random_(torch.iinfo(torch.int64).min, None, generator=generator).view(torch.uint8)


def signs_of(bits_NB: Tensor, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Turn packed bits into -1 and 1 [tokens, vocabulary]."""
    signs_8 = _signs_of_bytes(dtype, bits_NB.device).index_select(0, bits_NB.flatten().to(torch.int32))
    return signs_8.view(len(bits_NB), -1)[:, :vocabulary]


@functools.cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the eight signs of each byte [256, 8]: a look-up takes a third of the time of shifting bits."""
    places_8, bytes_256 = (torch.arange(count, device=device) for count in (8, 256))
    return ((bytes_256[:, None] >> places_8) & 1).to(dtype).mul_(2).sub_(1)


def numbered_generator(seed: int, number: int, purpose: str) -> torch.Generator:
    """Return the source of random numbers for some purpose in a calibration window or a layer; on the CPU."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(seed, number, purpose)[:4], "little"))


def _digest(seed: int, number: int, purpose: str) -> bytes:
    return hashlib.sha256(f"{seed} {number} {purpose}".encode()).digest()


def summed_divergence(model: Outputs, dense: Outputs, labels_N: Tensor, label_weight: float) -> Tensor:
    """Return the sum over tokens of KL(dense || model) + label_weight * -log p(label) in nats, a float32 scalar
    (float64 if the model is float64): a loss for training that never holds the logits of all tokens.

    Args:
        model: there may be no tokens; the head gets gradients only if the dense model has another.
        dense: for the same tokens, in the same dtype.
        labels_N: int64, negative where there is no label.
    """
    hidden_NC = model.hidden_NC
    if not len(hidden_NC):
        return hidden_NC.sum(dtype=wide_dtype(hidden_NC.dtype))

    def weighted(rows: Rows) -> tuple[Tensor, Tensor]:
        if not label_weight:
            return divergence_of_rows(rows)
        label_N, label_gradient_NV = cross_entropy_gradient(rows.logits_NV.clone(), labels_N[rows.numbers])
        kl_N, gradient_NV = divergence_of_rows(rows)
        return kl_N.add_(label_N, alpha=label_weight), gradient_NV.add_(label_gradient_NV, alpha=label_weight)

    own_head = (model.weight_VC, model.bias_V) if dense.weight_VC is not model.weight_VC else ()
    trained = [part for part in own_head if part is not None and part.requires_grad]
    gradients = [torch.zeros_like(part, dtype=wide_dtype(part.dtype)) for part in trained]

    def add_to_head(gradient_NV: Tensor, rows: slice) -> None:
        for part, gradient in zip(trained, gradients, strict=True):
            gradient += gradient_NV.T @ hidden_NC[rows] if part.ndim > 1 else gradient_NV.sum(0)

    with torch.no_grad():
        ((loss_N, gradient_NC),) = head_gradients(
            replace(model, hidden_NC=hidden_NC.detach()), [weighted], dense, add_to_head if trained else None
        )
    known = gradient_NC, *gradients
    function: Any = _WithGradients  # torch 2.13 has no types for apply, 2.15 does
    divergence: Tensor = function.apply(loss_N.sum(), known, hidden_NC, *trained)
    return divergence


def divergence_of_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the divergence from the dense model at some tokens, and its gradient at the logits."""
    assert rows.teacher_NV is not None
    return distillation_gradient(rows.logits_NV, rows.teacher_NV)


class _WithGradients(Function):
    """A loss whose gradients at some tensors are known already, so that backward needs no more than these."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *_tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in _tensors]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        known = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *((gradient * slope.to(gradient.dtype)).to(dtype) for gradient, dtype in known)

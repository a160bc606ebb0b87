"""Checks that an architecture does no more than we know: a model's layers, made one at a time, must compute what they
do in the whole model, and its logits must be what its head makes.

Passes layer by layer make each layer from its weights and a configuration. An architecture can do more than that
between its layers (scale embeddings, treat layers by their number), and a pass unaware of that would prune on wrong
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.schema import Sharding
from hfprune_dist.core.devices import send
from hfprune_dist.distributed.frozen_model import FrozenModel, choose_sharding
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import Sizes, whole_forward
from hfprune_dist.models.loading import after_head
from hfprune_dist.models.single_layer import LayerReader, read_by, run

# Relative errors that rounding explains: of sums in another order.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
TOKENS = 16  # whose logits are compared


def check_layers(
    checkpoint: Checkpoint, window_T: Tensor, dtype: torch.dtype, sharding: Sharding, world: World
) -> None:
    """Check a model's logits (``check_logits``); run the whole model on one window, and each layer by itself on what it
    reads there; compare them. Collective.

    Args:
        window_T: token ids, int64 [tokens].
        sharding: how the whole model is placed on the ranks (``runtime.sharding``).

    Raises:
        UserError: as ``check_logits``, or naming the first layer that departs by more than rounding explains.
    """
    need = whole_forward(Sizes.from_checkpoint(checkpoint), len(window_T), dtype.itemsize)
    placed = choose_sharding(sharding, need, world)
    if placed == "zero3" or world.is_first:
        model = FrozenModel(checkpoint, dtype, placed, world)
        departures: list[Departure] = []
        check_logits(checkpoint, model, window_T)
        if world.is_first:
            _compare_in_forward(model.module, checkpoint, dtype, window_T, world.device, departures)
        model.final_hidden(window_T)
        model.release()
        refuse_departures(departures, dtype)


def _compare_in_forward(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    window_T: Tensor,
    device: torch.device,
    departures: list[Departure],
) -> None:
    """Compare, during the model's next forward, what its parts put out with what they compute alone."""
    family, reader = checkpoint.family, LayerReader(checkpoint, dtype, device)
    # What the next layer should read, and its name: embeddings made alone, then what the model's own layer puts out, so
    # that errors don't add up.
    reached_BTC, name = reader.embed({0: window_T[None]})[0], "embeddings"

    def compare(ours_BTC: Tensor, model_BTC: Tensor) -> None:
        ours_NC, theirs_NC = (send(states_BTC.detach().flatten(0, 1), device) for states_BTC in (ours_BTC, model_BTC))
        what = f"{family.model_type}: computed alone, {name} depart from the whole model's"
        departures.append(Departure.between(ours_NC, theirs_NC, what))

    def before(_layer: nn.Module, inputs: tuple[Tensor, ...], options: Mapping[str, Any]) -> None:
        compare(reached_BTC, read_by(inputs, options))

    def after(number: int) -> Any:
        def compare_layer(_layer: nn.Module, inputs: Any, options: Mapping[str, Any], output: Any) -> None:
            nonlocal reached_BTC, name
            reached_BTC, name = output if isinstance(output, Tensor) else output[0], f"outputs of layer {number}"
            compare(run(reader.layer(number), read_by(inputs, options)), reached_BTC)

        return compare_layer

    def at_the_end(_body: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal name
        name = "the final norm's outputs"
        compare(reader.final_norm()(reached_BTC), output.last_hidden_state)

    for number, layer in enumerate(family.layers_of(model)):
        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after(number), with_kwargs=True)
    family.body_of(model).register_forward_hook(at_the_end)


@torch.no_grad()
def check_logits(checkpoint: Checkpoint, model: FrozenModel, window_T: Tensor) -> None:
    """Refuse a model whose logits of some text aren't those that its head and ``after_head`` give, or are NaN or
    infinite although its hidden states aren't; words may have -inf, as in a padded vocabulary. Collective.
    """
    window_T = window_T[:TOKENS].to(model.world.device)
    logits_NV = model.module(input_ids=window_T[None], use_cache=False).logits[0].float()
    hidden_NC = model.final_hidden(window_T)
    with model.head() as (weight_VC, bias_V):
        ours_NV = after_head(checkpoint)(nn.functional.linear(hidden_NC, weight_VC, bias_V)).float()
    impossible_NV = ours_NV.isneginf() & logits_NV.isneginf()
    ours_NV, logits_NV = (z_NV.masked_fill(impossible_NV, 0.0) for z_NV in (ours_NV, logits_NV))
    if hidden_NC.isfinite().all() and not logits_NV.isfinite().all():
        raise UserError(f"{checkpoint.path}: logits are NaN or infinite; check the weights of its head")
    what = f"{checkpoint.path}: logits of {checkpoint.family.model_type} depart from what its head makes"
    refuse_departures([Departure.between(ours_NV, logits_NV, what)], hidden_NC.dtype)


class Departure(NamedTuple):
    """How far what a pass computes is from what the model does, as a share of its size.

    Attributes:
        error: a root mean square over rows, float64; on the device until many are read at once.
        what: the beginning of a message about it.
    """

    error: Tensor
    what: str

    @classmethod
    def between(cls, ours_NC: Tensor, theirs_NC: Tensor, what: str) -> Departure:
        """Compare rows; other checks report rows of the model's that aren't finite."""
        finite_N, norms_N = theirs_NC.isfinite().all(dim=1), theirs_NC.double().norm(dim=1).clamp(min=1e-30)
        squares_N = ((ours_NC.double() - theirs_NC.double()).norm(dim=1) / norms_N).square()
        return cls((squares_N.where(finite_N, 0.0).sum() / finite_N.sum().clamp(min=1)).sqrt(), what)


def refuse_departures(departures: Sequence[Departure], dtype: torch.dtype, remedy: str = "it is not supported") -> None:
    """End a pass that doesn't compute what the model does.

    Args:
        dtype: that both were computed in.

    Raises:
        UserError: naming the first whose error is more than rounding explains, or NaN.
    """
    errors = torch.stack([found.error for found in departures]).tolist() if departures else []
    for (_, what), error in zip(departures, errors, strict=True):
        if not error <= TOLERANCES[dtype]:
            raise UserError(
                f"{what} by {error:.2g} of their size (rounding explains {TOLERANCES[dtype]:g}). The architecture does "
                f"more than hfprune_dist/checkpoints/families.py knows, so results would be wrong; {remedy}"
            )

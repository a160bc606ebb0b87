"""Frozen models: whole on every rank, or one model sharded over all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.schema import Sharding
from hfprune_dist.config.section import PositiveOrAuto
from hfprune_dist.core.devices import send
from hfprune_dist.distributed.world import World
from hfprune_dist.kinds.memory import Gpus, Need, Passes, Placement, passes, place
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.models.memory_efficient_backward import branch_off
from hfprune_dist.store.machine import available_memory

# How a model is sharded once that is decided.
DecidedSharding = Literal["replicate", "zero3"]
# Alignment of torch's allocations, in bytes.
ALIGNMENT = 64


def placement_here(need: Need, sharding: Sharding, world: World) -> Placement:
    """Decide together where weights lie in the free memory; the rank with the least of it decides for all."""
    return place(need, gpus_here(world), sharding)


def gpus_here(world: World) -> Gpus:
    """The ranks, each with as much free memory as the one with the least of it."""
    return Gpus(world.size, min(world.all_gather(free_bytes(world))))


def passes_here(
    need: Callable[[int], Need], setting: PositiveOrAuto, most: int, sharding: Sharding, world: World
) -> Passes:
    """``passes`` in the free memory of the world's GPUs; collective. On CPUs, ``auto`` is one window at a time."""
    if world.device.type == "cpu":
        return Passes(1 if setting == "auto" else setting)
    return passes(need, setting, most, gpus_here(world), sharding)


def choose_sharding(requested: Sharding, need: Need, world: World) -> DecidedSharding:
    """Decide together how to place a model: whole on each rank if it fits everywhere, otherwise sharded."""
    return "replicate" if placement_here(need, requested, world).whole else "zero3"


def free_bytes(world: World) -> float:
    """Free memory of this rank: its GPU's, or its share of the available main memory."""
    if world.device.type == "cuda":
        # What torch keeps of memory that was freed is free for tensors, although the device counts it as taken.
        kept = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        return float(torch.cuda.mem_get_info(world.device)[0] + kept)
    return available_memory() / world.local_size


class FrozenModel:
    """A causal language model whose weights get no gradients, placed on the ranks of a world.

    Args:
        backward_of_body: whether backwards may follow forwards of the body alone; they then have the same bits wherever
            the weights are.

    Attributes:
        module: the Hugging Face model. If it is sharded, each of its forwards is a collective of all ranks.
        world: the ranks.
        max_positions: the longest sequence that it can read; None if its config.json doesn't say.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        sharding: DecidedSharding,
        world: World,
        *,
        backward_of_body: bool = False,
    ) -> None:
        self._family = checkpoint.family
        self.world = world
        self.max_positions = checkpoint.max_positions
        self._idle = False
        self._zero3: Any = None  # if the model is sharded
        self._begin_forward_of_body: Callable[[], None] = lambda: None
        if sharding == "zero3":
            # DeepSpeed takes long to import, and one rank doesn't need it.
            from hfprune_dist.distributed import zero3

            self._zero3 = zero3
            self.module, begin_step = zero3.load_frozen(checkpoint.path, dtype, world)
            if backward_of_body:
                self._family.body_of(self.module).register_forward_pre_hook(lambda *_: begin_step(), prepend=True)
            else:
                self._begin_forward_of_body = begin_step
            self.module.register_forward_pre_hook(self._announce, prepend=True)
            return
        model: Any = load_causal_lm(checkpoint.path, dtype, world.device)
        if self._family.experts:
            _align(model)
        self.module = model.requires_grad_(False).eval()
        if backward_of_body:
            branch_off(self.module, self._family)

    def final_hidden(self, input_ids_T: Tensor) -> Tensor:
        """Final hidden states [T, hidden_size] of one sequence. If sharded, all ranks must call it equally often."""
        return self.final_hidden_of({"input_ids": send(input_ids_T[None], self.world.device)})[0]

    @torch.no_grad()
    def final_hidden_of(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The same [B, T, hidden_size] of a batch, given as what the body reads, on the device."""
        self._begin_forward_of_body()
        hidden_BTC: Tensor = self._family.body_of(self.module)(**inputs, use_cache=False).last_hidden_state
        return hidden_BTC

    @torch.no_grad()
    def logits_at(
        self, input_ids_BT: Tensor, places_N: Tensor, cache: Any = None, first_position: int = 0
    ) -> tuple[Tensor, Any]:
        """Logits at some places of a batch that is flattened to [B * T], [N, vocabulary], and the cache after it; for
        the other places, nothing is multiplied with the head. If sharded, it is a forward of ``module``. The batch may
        extend a cache of the tokens before it; its own positions then begin at ``first_position``.
        """
        device = self.world.device
        options: dict[str, Any] = {"use_cache": self.cache_expands}
        if cache is not None and "position_ids" in inspect.signature(self.module.forward).parameters:
            # Some models count from 0 whatever the cache holds.
            positions_T = torch.arange(first_position, first_position + input_ids_BT.shape[1], device=device)
            options["position_ids"] = positions_T.expand(input_ids_BT.shape)
        with self.head_at(places_N):
            outputs = self.module(input_ids=send(input_ids_BT, device), cache=cache, **options)
        return outputs.logits[0], outputs.get("cache")

    @contextmanager
    def head_at(self, places_N: Tensor) -> Iterator[None]:
        """Within the context, the head reads only some places of a batch that is flattened to [B * T]: logits are
        [1, N, vocabulary].
        """
        places_N = send(places_N, self.world.device)
        hook = self._family.head_of(self.module).register_forward_pre_hook(
            lambda _head, inputs: inputs[0].flatten(0, 1)[places_N][None]
        )
        try:
            yield
        finally:
            hook.remove()

    @cached_property
    def cache_expands(self) -> bool:
        """Whether several sequences can go on from the cache of their common beginning: one of keys and values alone,
        unlike recurrent states. Collective if sharded: a forward of one token tells.
        """
        token_BT = torch.zeros((1, 1), dtype=torch.int64, device=self.world.device)
        with torch.no_grad():
            cache = self.module(input_ids=token_BT, use_cache=True).get("cache")
        layers = cache.layers if type(cache) is DynamicCache else [None]
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def release(self) -> None:
        """Free the memory of the weights, since DeepSpeed holds on to a model for ever; it can't be used any more."""
        parameters: Iterable[Any] = self.module.parameters()
        for parameter in parameters:
            held = parameter.ds_tensor if self._zero3 else parameter
            held.data = held.data.new_empty(0)

    @contextmanager
    def head(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the whole weight [vocabulary, hidden_size] and bias of the head, for use within the context."""
        head = self._family.head_of(self.module)
        with self.gathered([head]):
            yield head.weight, head.bias

    def gathered(self, linears: Sequence[Any]) -> AbstractContextManager[None]:
        """A context in which linear layers have their whole weights and biases; collective if sharded."""
        return self._zero3.gathered(linears) if self._zero3 else nullcontext()

    def before_backward(self) -> Callable[[], None]:
        """Call after a forward; returns a function to call before each backward of that forward."""
        return self._zero3.before_backward(self.module) if self._zero3 else lambda: None

    def join_idle_forwards(self) -> None:
        """Take part in the other ranks' forwards of ``module`` until no rank needs another one.

        This lets ranks of a sharded model make different numbers of forwards. Every rank must call it when done.
        """
        if not self._zero3:
            return
        token_BT = torch.zeros((1, 1), dtype=torch.int64, device=self.world.device)
        self._idle = True
        with torch.no_grad():
            while any(self.world.all_gather(False)):
                self.module(input_ids=token_BT, use_cache=False)
        self._idle = False

    def _announce(self, *_: Any) -> None:
        """Tell the ranks that are done, before a forward, to take part in it."""
        if not self._idle:
            self.world.all_gather(True)


def _align(model: nn.Module) -> None:
    """Align weights as those that are gathered from ranks are, rather than as their file happens to be mapped.

    Otherwise, on CPUs, products with the few tokens that an expert may have would have other bits.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()

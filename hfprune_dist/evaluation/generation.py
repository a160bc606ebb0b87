"""Timed greedy generation, and the memory that it takes."""

from __future__ import annotations

import inspect
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

SEED = 0


@dataclass(frozen=True)
class Workload:
    """What to generate: ``new_tokens`` (at least two) for each of ``batch_size`` prompts of ``prompt_tokens``."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"batch {self.batch_size}, {self.prompt_tokens} in, {self.new_tokens} out"

    def prompts(self, vocabulary: int, device: torch.device) -> Tensor:
        """Random tokens, the same for all models with this vocabulary size, int64 [batch_size, prompt_tokens]."""
        shape = (self.batch_size, self.prompt_tokens)
        return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(SEED)).to(device)


class Seconds(NamedTuple):
    """Duration of one generation, in seconds: until the ``first`` new token of each prompt, and for the ``others``."""

    first: float
    others: float


@torch.inference_mode()
def time_generation(model: nn.Module, prompts_BT: Tensor, new_tokens: int) -> Seconds:
    """Have a causal LM generate the most likely tokens one by one, with a cache, past any end-of-text token."""
    started = _now(prompts_BT.device)
    next_B1, cache = _step(model, prompts_BT, None)
    first = _now(prompts_BT.device)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    begin = prompts_BT.shape[1]
    for position in range(begin, begin + new_tokens - 1):
        # Some models (bamba) count positions from 0 whatever the cache holds.
        positions = {"position_ids": torch.full_like(next_B1, position)} if takes_positions else {}
        next_B1, cache = _step(model, next_B1, cache, **positions)
    return Seconds(first - started, _now(prompts_BT.device) - first)


def _step(model: nn.Module, input_ids_BT: Tensor, cache: Any, **positions: Tensor) -> tuple[Tensor, Any]:
    """The most likely next tokens [B, 1], and the cache extended by the input."""
    outputs = model(input_ids=input_ids_BT, cache=cache, use_cache=True, logits_to_keep=1, **positions)
    return outputs.logits[:, -1].argmax(dim=-1, keepdim=True), outputs.cache


def _now(device: torch.device) -> float:
    """Clock time in seconds, after the device has finished all pending work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers in memory; tied ones count once."""
    return sum(tensor.nbytes for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Peak memory of torch's allocator for a device during an action, in bytes beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)

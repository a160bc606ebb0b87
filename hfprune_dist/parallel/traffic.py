"""Counting what ZeRO-3 gathers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters


@dataclass
class Gathered:
    """All-gathers of parameters on this rank.

    Attributes:
        calls: collectives; one may gather several parameters.
        bytes: of whole parameters, padding to a multiple of the ranks included.
    """

    calls: int = 0
    bytes: int = 0


@contextmanager
def counting_gathers() -> Iterator[Gathered]:
    """Count the all-gathers that DeepSpeed starts for as long as the context lasts."""
    gathered = Gathered()
    original = partition_parameters._dist_allgather_fn

    def counted(shard: torch.Tensor, whole: torch.Tensor, group: Any = None) -> Any:
        gathered.calls += 1
        gathered.bytes += whole.nbytes
        return original(shard, whole, group)

    partition_parameters._dist_allgather_fn = counted
    try:
        yield gathered
    finally:
        partition_parameters._dist_allgather_fn = original

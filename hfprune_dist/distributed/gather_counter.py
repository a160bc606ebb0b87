"""Counts of what ZeRO-3 gathers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.comm import comm


@dataclass
class Gathered:
    """All-gathers of parameters on this rank.

    Attributes:
        calls: collectives; one may gather several parameters.
        bytes: size of whole parameters, including padding to a multiple of the number of ranks.
    """

    calls: int = 0
    bytes: int = 0


@contextmanager
def counting_gathers() -> Iterator[Gathered]:
    """Count the all-gathers that DeepSpeed starts within the context."""
    gathered = Gathered()
    backend: Any = comm.cdb
    original = backend.all_gather_function

    def counted(output_tensor: torch.Tensor, **arguments: Any) -> Any:
        gathered.calls += 1
        gathered.bytes += output_tensor.nbytes
        return original(output_tensor=output_tensor, **arguments)

    backend.all_gather_function = counted
    try:
        yield gathered
    finally:
        backend.all_gather_function = original

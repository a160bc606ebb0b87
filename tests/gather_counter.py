"""A counter of what ZeRO-3 gathers."""

from contextlib import contextmanager
from dataclasses import dataclass

from deepspeed.comm import comm

# By default, DeepSpeed leaves parameters with at most this many elements unsharded.
SMALL_PARAMETER = 100_000


@dataclass
class Gathered:
    """All-gathers of parameters on this rank.

    Attributes:
        bytes: size of whole parameters, including padding to a multiple of the number of ranks.
    """

    bytes: int = 0


@contextmanager
def counting_gathers():
    """Count the all-gathers that DeepSpeed starts within the context."""
    gathered = Gathered()
    backend = comm.cdb
    original = backend.all_gather_function

    def counted(output_tensor, **arguments):
        gathered.bytes += output_tensor.nbytes
        return original(output_tensor=output_tensor, **arguments)

    backend.all_gather_function = counted
    try:
        yield gathered
    finally:
        backend.all_gather_function = original

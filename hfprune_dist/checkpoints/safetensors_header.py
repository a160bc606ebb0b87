"""The header of a safetensors file, read without torch: the tensors' names, shapes and places in the file."""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.lfs_pointers import refuse_pointer
from hfprune_dist.errors import UserError

# Bytes per number, by the file format's name for its type. Any other type means quantized weights.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file.

    Attributes:
        dtype: the file format's own name (F32, BF16, ...).
        offset: where its bytes begin in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file, and check that the file is as long as its header says.

    Raises:
        UserError: if the file is missing, damaged or truncated.
    """
    try:
        refuse_pointer(file)
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        size = file.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{file}: missing; download the checkpoint again") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (struct.error, ValueError, OverflowError, MemoryError, RecursionError):
        raise UserError(f"{file}: not a whole safetensors file (its header is damaged); download it again") from None
    data = 8 + header_bytes
    try:
        tensors = {name: _tensor_info(file.name, data, it) for name, it in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: its header is not that of a safetensors file; download it again") from None
    _check_places(tensors.values(), file, data)
    expected = max((info.offset + info.bytes for info in tensors.values()), default=data)
    if size != expected:
        raise UserError(f"{file}: {size:,} bytes, but its header announces {expected:,}; truncated? download it again")
    return tensors


def bytes_of_files(tensors: Iterable[TensorInfo]) -> int:
    """Size of the files, headers included, that hold these tensors and no others."""
    ends: dict[str, int] = {}
    for info in tensors:
        ends[info.file] = max(ends.get(info.file, 0), info.offset + info.bytes)
    return sum(ends.values())


def _tensor_info(file: str, data: int, entry: Mapping[str, Any]) -> TensorInfo:
    """Read a header's entry; offsets in it count from ``data``, the end of the header."""
    begin, end = entry["data_offsets"]
    shape = tuple(operator.index(size) for size in entry["shape"])
    return TensorInfo(file, entry["dtype"], shape, data + operator.index(begin), operator.index(end - begin))


def _check_places(tensors: Iterable[TensorInfo], file: Path, data: int) -> None:
    """Check that the tensors follow one another from ``data`` on, each as long as its shape says."""
    for info in sorted(tensors, key=lambda info: (info.offset, info.bytes)):
        is_long_enough = info.dtype not in FLOATS or info.bytes == info.numel * FLOATS[info.dtype]
        if info.offset != data or not is_long_enough:
            raise UserError(f"{file}: its header contradicts itself about where tensors are; download it again")
        data += info.bytes

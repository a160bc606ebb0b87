"""Streaming a smaller copy of a checkpoint: tensor by tensor from file to file, never the whole model in memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.cut import Cut
from hfprune_dist.checkpoints.safetensors_header import TensorInfo, read_safetensors_header
from hfprune_dist.checkpoints.weight_files import INDEX_FILE
from hfprune_dist.core.selection import entries_of
from hfprune_dist.store.atomic_files import write_json

# Where layers differ, this module of ours travels inside the checkpoint.
MODELING_FILE = Path(__file__).with_name("modeling_pruned.py")
COPY_BYTES = 256 * 1024

# A tensor as it is -> the tensor to write, of the same dtype.
Transform = Callable[[Tensor], Tensor]


def unit_cuts(checkpoint: Checkpoint, kept: Sequence[Tensor]) -> dict[str, Cut]:
    """The cut of every tensor that shrinks when layer ``i`` keeps the units ``kept[i]`` (ascending int64)."""
    return {
        name: Cut(owned.axis, entries_of(kept_K, owned.per_unit))
        for layer, kept_K in enumerate(kept)
        for name, owned in checkpoint.units.in_layer(layer, checkpoint.tensors)
    }


def write_weight_file(
    checkpoint: Checkpoint,
    file: str,
    cuts: Mapping[str, Cut],
    target: Path,
    replacements: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Write one safetensors file of the smaller checkpoint.

    Args:
        replacements: tensor name -> reads what is written in place of the cut tensor, of the same shape.
    """
    shapes = {name: cut.shape(checkpoint.tensors[name].shape) for name, cut in cuts.items()}
    transforms: dict[str, Transform] = {name: cut.apply for name, cut in cuts.items()}
    for name, read in (replacements or {}).items():
        transforms[name] = partial(_replace, read)
    stream_weight_file(checkpoint, file, shapes, transforms, target)


def _replace(read: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    return read().to(tensor.dtype)


def stream_weight_file(
    checkpoint: Checkpoint,
    file: str,
    shapes: Mapping[str, tuple[int, ...]],
    transforms: Mapping[str, Transform],
    target: Path,
) -> None:
    """Write one safetensors file with some tensors transformed, one of them made while that before it is written.

    Peak memory is what one transform needs and the transformed tensor before it.

    Args:
        shapes: the shapes of the tensors whose shape changes.
        transforms: tensor name -> what is done to it; the other tensors' bytes are copied as they are.
    """
    infos = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
    path = checkpoint.path / file
    with safe_open(path, framework="pt") as source, path.open("rb") as raw, (target / file).open("wb") as stream:

        def transformed(name: str) -> Tensor:
            return transforms[name](source.get_tensor(name)).contiguous()

        tensors = _one_ahead(partial(transformed, name) for name in infos if name in transforms)
        stream.write(_header(infos, shapes))
        for name, info in infos.items():
            if name in transforms:
                stream.write(next(tensors).view(torch.uint8).numpy().data)
            else:
                raw.seek(info.offset)
                _copy(raw, stream, info.bytes)


def _one_ahead(makers: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """What each maker makes, in order; a thread makes the next one while its taker works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for make in makers:
            coming = pool.submit(make)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _header(infos: Mapping[str, TensorInfo], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """What a safetensors file begins with: the length of a JSON object, and that object."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        shape = shapes.get(name, info.shape)
        size = info.bytes // info.numel * math.prod(shape)
        header[name] = {"dtype": info.dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes, as the format asks
    return struct.pack("<Q", len(encoded)) + encoded


def _copy(source: BufferedReader, stream: BinaryIO, size: int) -> None:
    """Copy the next ``size`` bytes, through a buffer that stays in a core's cache."""
    buffer = memoryview(bytearray(min(size, COPY_BYTES)))
    while size:
        read = source.readinto(buffer[:size])
        if not read:
            raise OSError(f"{source.name}: it has been cut short while it was read")
        stream.write(buffer[:read])
        size -= read


def config_changes(checkpoint: Checkpoint, counts: Sequence[int]) -> dict[str, Any]:
    """What config.json says of a smaller checkpoint whose layers have so many units."""
    changes = checkpoint.units.config_changes(counts)
    if len(set(counts)) == 1:
        return changes
    name = checkpoint.family.pruned_class
    return {**changes, "architectures": [name], "auto_map": {"AutoModelForCausalLM": f"{MODELING_FILE.stem}.{name}"}}


def write_companions(checkpoint: Checkpoint, target: Path, changes: Mapping[str, Any]) -> None:
    """Copy tokenizer, generation config and licences; write config.json with ``changes`` and the weights' index.

    A checkpoint whose layers differ gets the file that plain transformers needs to load it.
    """
    for name in checkpoint.companion_files:
        if name != "config.json":
            shutil.copyfile(checkpoint.path / name, target / name)
    write_json(target / "config.json", {**checkpoint.config, **changes})
    if "auto_map" in changes:
        shutil.copyfile(MODELING_FILE, target / MODELING_FILE.name)
    if (checkpoint.path / INDEX_FILE).is_file():
        headers = [read_safetensors_header(target / file) for file in checkpoint.weight_files]
        total = sum(info.bytes for header in headers for info in header.values())
        weight_map = {name: info.file for name, info in checkpoint.tensors.items()}
        write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

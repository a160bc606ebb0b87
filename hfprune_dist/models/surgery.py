"""Streaming a smaller copy of a checkpoint: tensor by tensor from file to file, never the whole model in memory."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hfprune_dist.core.surgery import Cut, cut_tensor
from hfprune_dist.files import write_json
from hfprune_dist.models.checkpoint import INDEX_FILE, Checkpoint, read_safetensors_header

# Where layers differ in width, this module of ours travels inside the checkpoint.
MODELING_FILE = Path(__file__).with_name("modeling_pruned.py")


def mlp_cuts(checkpoint: Checkpoint, kept: Sequence[Tensor]) -> dict[str, Cut]:
    """The cut of every tensor that shrinks when layer ``i`` keeps the neurons ``kept[i]`` (ascending int64)."""
    cuts = {}
    for layer, kept_D in enumerate(kept):
        cuts[checkpoint.family.column_tensor(layer)] = Cut(1, kept_D)
        cuts |= {name: Cut(0, kept_D) for name in checkpoint.family.row_tensors(layer) if name in checkpoint.tensors}
    return cuts


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
    readers = replacements or {}

    def transform(name: str, tensor: Tensor) -> Tensor:
        return readers[name]().to(tensor.dtype) if name in readers else cut_tensor(name, tensor, cuts)

    stream_weight_file(checkpoint, file, shapes, transform, target)


def stream_weight_file(
    checkpoint: Checkpoint,
    file: str,
    shapes: Mapping[str, tuple[int, ...]],
    transform: Callable[[str, Tensor], Tensor],
    target: Path,
) -> None:
    """Write one safetensors file with every tensor transformed; peak memory is one tensor and its transformed copy.

    Args:
        shapes: the shapes of the tensors whose shape ``transform`` changes.
        transform: name, tensor -> the tensor to write, of the same dtype.
    """
    infos = {name: info for name, info in checkpoint.tensors.items() if info.file == file}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in infos.items():
        shape = shapes.get(name, info.shape)
        size = info.bytes // info.numel * torch.Size(shape).numel()
        header[name] = {"dtype": info.dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes, as the format asks
    with safe_open(checkpoint.path / file, framework="pt") as source, (target / file).open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in infos:
            tensor = transform(name, source.get_tensor(name)).contiguous()
            stream.write(tensor.view(torch.uint8).numpy().data)


def config_changes(checkpoint: Checkpoint, widths: Sequence[int]) -> dict[str, Any]:
    """What config.json says about the widths of the smaller checkpoint's layers."""
    if len(set(widths)) == 1:
        return {"intermediate_size": widths[0]}
    name = checkpoint.family.pruned_class
    return {
        "per_layer_config": {str(layer): {"intermediate_size": width} for layer, width in enumerate(widths)},
        "architectures": [name],
        "auto_map": {"AutoModelForCausalLM": f"{MODELING_FILE.stem}.{name}"},
    }


def write_companions(checkpoint: Checkpoint, target: Path, changes: Mapping[str, Any]) -> None:
    """Copy tokenizer, generation config and licences; write config.json with ``changes`` and the weights' index.

    A checkpoint whose layers have different widths gets the file that plain transformers needs to load it.
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

"""Streaming a smaller copy of a checkpoint: tensor by tensor from file to file, never the whole model in memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import AUTO_CLASS, MODELING_FILE, is_plain, write_config
from hfprune_dist.checkpoints.read_tensors import DTYPES, open_weights
from hfprune_dist.checkpoints.stored_names import SAME, StoredNames
from hfprune_dist.checkpoints.weight_files import INDEX_FILE, TensorInfo, read_safetensors_header
from hfprune_dist.core.selection import entries_of
from hfprune_dist.errors import naming
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.structures import LAYERS
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.layout import Layout, Placed
from hfprune_dist.structures.low_rank import FACTORS


@dataclass(frozen=True)
class Cut:
    """What stays of a tensor along each of its dimensions that shrink: ascending int64 [entries] or, if others stay of
    each matrix of a stack, [matrices, entries]; dtype and bits don't change.
    """

    kept: Mapping[int, Tensor]

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.kept[place].shape[-1] if place in self.kept else size for place, size in enumerate(shape))

    def apply(self, tensor: Tensor) -> Tensor:
        for place, kept in self.kept.items():
            if kept.ndim == 1:
                tensor = tensor.index_select(place, kept)
            else:
                tensor = torch.stack(
                    [part.index_select(place - 1, own) for part, own in zip(tensor, kept, strict=True)]
                )
        return tensor


@dataclass(frozen=True)
class Written:
    """A tensor to write: its name in the new model, the old tensor whose place and dtype it has, and what makes it."""

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def staying(checkpoint: Checkpoint, kept: Kept) -> dict[str, tuple[str, Cut]]:
    """Name of each tensor that stays -> its name in the smaller checkpoint, renumbered, and its cut."""
    axes, layout, found = kept.axes, checkpoint.layout, dict[str, tuple[str, Cut]]()
    numbers = {axis: {unit: place for place, unit in enumerate(kept_K.tolist())} for axis, kept_K in axes.items()}
    numbers[LAYERS] = {layer: place for place, layer in enumerate(kept.layers)}
    for name, tensor in layout.tensors.items():
        places = [numbers[axis].get(index) if axis in numbers else index for axis, index in tensor.within]
        if None not in places:
            found[name] = tensor.pattern.format(*places), _cut_of(layout, tensor, axes, places[1:])
    return found


def _cut_of(layout: Layout, tensor: Placed, axes: Mapping[str, Tensor], expert: Sequence[int | None]) -> Cut:
    """The cut of a tensor; of one of an expert's own, that is its number among those that stay."""
    cuts = {}
    for place, each in enumerate(tensor.dimensions):
        if each is not None and each.axis in axes:
            kept_K, width, outer = axes[each.axis], layout.width(each.axis), layout.outer(each.axis)
            if outer is None:
                cuts[place] = entries_of(kept_K, each.entries, each.stretches, width)
            else:
                parts = kept_K.view(len(axes.get(outer, range(layout.sizes[outer]))), -1) % width
                own = [entries_of(part, each.entries, each.stretches, width) for part in parts]
                cuts[place] = torch.stack(own)[expert[0] if expert else slice(None)]
    return Cut(cuts)


def write_weight_file(
    checkpoint: Checkpoint,
    file: str,
    kept: Kept,
    target: Path,
    replacements: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Write one safetensors file of the smaller checkpoint, or no file if nothing of it stays.

    Args:
        replacements: name of a tensor in ``checkpoint`` -> reads the tensor to write in place of the cut one, of the
            same shape. A bias that ``checkpoint`` lacks, under the name it would have there, is written after its
            weight. A projection given a low rank has one entry for each factor.
    """
    given, found = replacements or {}, staying(checkpoint, kept)
    ranks = {
        checkpoint.units.tensor(layer, projection): rank
        for projection, row in kept.ranks.items()
        for layer, rank in zip(kept.layers, row, strict=True)
    }
    added = any(name.endswith(".bias") and name not in checkpoint.tensors for name in given)
    stored = checkpoint.names if is_plain(checkpoint, kept.shape) and not added else SAME
    written: list[Written] = []
    with open_weights(checkpoint) as read:
        for name, info in checkpoint.tensors.items():
            if info.file != file or name not in found:
                continue
            (named, cut), (module, _, part) = found[name], name.rpartition(".")
            new = named.removesuffix(f".{part}")
            if module in ranks and part == "weight":
                rank, (outputs, inputs) = ranks[module], info.shape
                for factor, size in zip(FACTORS, ((rank, inputs), (outputs, rank)), strict=True):
                    made = given[f"{module}.{factor}.weight"]
                    written.append(Written(f"{new}.{factor}.weight", info, size, made))
                continue
            named = f"{new}.{FACTORS[-1]}.{part}" if module in ranks else named
            made, shape = partial(read, name), info.shape
            made, shape = partial(lambda cut, whole: cut.apply(whole()), cut, made), cut.shape(shape)
            written.append(Written(named, info, shape, given.get(name, made)))
            bias = f"{module}.bias"
            if part == "weight" and bias in given and bias not in checkpoint.tensors:
                written.append(Written(f"{new}.bias", info, shape[:1], given[bias]))
        if written:
            _write(written, target / file, stored)


def _write(written: Sequence[Written], file: Path, stored: StoredNames) -> None:
    """Write a safetensors file, one tensor after another, whose names in it ``stored`` tells."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in written:
        begin, end = end, end + part.source.bytes * math.prod(part.shape) // max(part.source.numel, 1)
        entry = {"dtype": part.source.dtype, "shape": list(part.shape), "data_offsets": [begin, end]}
        header[stored.in_files(part.name)] = entry
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes, as the format asks
    with naming(file), file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for part in written:
            tensor = part.make()
            exact = tensor.to(DTYPES.get(part.source.dtype, tensor.dtype)).contiguous()
            stream.write(exact.reshape(-1).view(torch.uint8).numpy().data)


def write_companions(checkpoint: Checkpoint, target: Path, config: Mapping[str, Any]) -> None:
    """Copy tokenizer, generation config and licences; write ``config`` as config.json, and the weights' index.

    A checkpoint that isn't plain gets the file that plain transformers needs to load it. Other code for the model that
    came with the dense checkpoint is left out, and so are config.json's references to it.
    """
    needs_ours = str((config.get("auto_map") or {}).get(AUTO_CLASS)).startswith(f"{MODELING_FILE.stem}.")
    for name in checkpoint.travelling_files:
        if name not in ("config.json", MODELING_FILE.name):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(checkpoint.path / name, target / name)
    if config["model_type"] != checkpoint.config["model_type"]:
        # For some architectures, transformers makes a tokenizer by rules of its own and takes only the vocabulary from
        # tokenizer.json; for others, it takes that as it is, and a text would get other ids.
        options = {"trust_remote_code": False, "mistral_format": False}
        AutoTokenizer.from_pretrained(checkpoint.path, **options).save_pretrained(target)
    stated = {key: value for key, value in checkpoint.config_file(config).items() if needs_ours or key != "auto_map"}
    write_config(stated, target)
    if needs_ours:
        shutil.copyfile(MODELING_FILE, target / MODELING_FILE.name)
    if (checkpoint.path / INDEX_FILE).is_file():
        files = [target / file for file in checkpoint.weight_files]
        infos = {name: info for file in files if file.is_file() for name, info in read_safetensors_header(file).items()}
        total = sum(info.bytes for info in infos.values())
        weight_map = {name: info.file for name, info in infos.items()}
        write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

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
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.low_rank import FACTORS
from hfprune_dist.structures.units import Owned, Units


@dataclass(frozen=True)
class Cut:
    """Keep some entries along one dimension of a tensor, ascending int64 [entries], and drop the rest; dtype and bits
    don't change. A tensor that stacks one matrix for each expert may keep other entries of each [experts, entries].
    """

    dimension: int
    kept: Tensor

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[: self.dimension], self.kept.shape[-1], *shape[self.dimension + 1 :])

    def apply(self, tensor: Tensor) -> Tensor:
        if self.kept.ndim == 2:
            cuts = (Cut(self.dimension - 1, kept) for kept in self.kept)
            return torch.stack([cut.apply(matrix) for cut, matrix in zip(cuts, tensor, strict=True)])
        return tensor.index_select(self.dimension, self.kept)


@dataclass(frozen=True)
class Written:
    """A tensor to write: its name in the new model, the old tensor whose place and dtype it has, and what makes it."""

    name: str
    source: TensorInfo
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def staying(checkpoint: Checkpoint, kept: Kept) -> dict[str, tuple[str, Cut | None]]:
    """Name of each tensor that stays -> its name in the smaller checkpoint, renumbered, and its cut if it shrinks."""
    assert not {EXPERTS, EXPERT_NEURONS} <= kept.units.keys(), "experts and their neurons are cut one after the other"
    prefix = f"{checkpoint.family.layers}."
    numbers = {str(layer): str(number) for number, layer in enumerate(kept.layers)}
    found: dict[str, tuple[str, Cut | None]] = {}
    for name in checkpoint.tensors:
        layer, _, part = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            found[name] = name, None
        elif layer in numbers:
            found[name] = f"{prefix}{numbers[layer]}.{part}", None
    for units, rows in ((checkpoint.structures[kind], rows) for kind, rows in kept.units.items()):
        for number, kept_K in zip(kept.layers, rows, strict=True):
            places = {unit: place for place, unit in enumerate(kept_K.tolist() if units.kind == EXPERTS else ())}
            for name, owned in units.in_layer(number, checkpoint.tensors) if units.counts[number] else ():
                new, _ = found.pop(name)
                if owned.unit is None:
                    found[name] = new, _cut_of(units, number, owned, kept_K)
                elif owned.unit in places:
                    begin, _, end = new.rpartition(f".{owned.unit}.")
                    found[name] = f"{begin}.{places[owned.unit]}.{end}", None
    return found


def _cut_of(units: Units, layer: int, owned: Owned, kept_K: Tensor) -> Cut:
    """The cut of one of a layer's tensors that leaves only the units ``kept_K``, equally many of every expert."""
    if owned.expert is None and not owned.stacked:
        return Cut(owned.axis, entries_of(kept_K, owned.per_unit, owned.parts, units.counts[layer]))
    width, of_experts = units.counts[layer] // units.parts, kept_K.reshape(units.parts, -1)
    if owned.expert is not None:
        return Cut(owned.axis, of_experts[owned.expert] - width * owned.expert)
    own = (
        entries_of(kept_units - width * expert, owned.per_unit, owned.parts, width)
        for expert, kept_units in enumerate(of_experts)
    )
    return Cut(owned.axis, torch.stack(list(own)))


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
            if cut is not None:
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

"""Streaming a smaller copy of a checkpoint: tensor by tensor from file to file, never the whole model in memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import AUTO_CLASS, MODELING_FILE, is_plain, write_config
from hfprune_dist.checkpoints.stored_names import SAME, StoredNames
from hfprune_dist.checkpoints.weight_files import INDEX_FILE, read_safetensors_header
from hfprune_dist.core.selection import entries_of
from hfprune_dist.errors import naming
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.low_rank import FACTORS, factor_shapes
from hfprune_dist.structures.units import Owned, Units

COPY_BYTES = 256 * 1024
# The dtype that holds a number's bits, by its size in bytes.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# A tensor as read -> the tensor to write, of the same dtype.
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """Keep some entries along one dimension of a tensor, and drop the rest; dtype and bits don't change.

    Attributes:
        kept: ascending int64 [entries]; or [experts, entries], for a tensor that stacks one matrix for each expert.
    """

    dimension: int
    kept: Tensor

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape after the cut."""
        return (*shape[: self.dimension], self.kept.shape[-1], *shape[self.dimension + 1 :])

    def apply(self, tensor: Tensor) -> Tensor:
        """The kept entries."""
        if self.kept.ndim == 2:
            cuts = (Cut(self.dimension - 1, kept) for kept in self.kept)
            return torch.stack([cut.apply(matrix) for cut, matrix in zip(cuts, tensor, strict=True)])
        if self.dimension == 0:
            return tensor.index_select(0, self.kept)
        # Along rows, index_select takes twice as long as gather, which is faster with integers than with bfloat16.
        kept_by_row = self.kept.expand(len(tensor), -1)
        return tensor.view(BITS[tensor.itemsize]).gather(1, kept_by_row).view(tensor.dtype)


@dataclass(frozen=True)
class Written:
    """A tensor to write to a file.

    Attributes:
        name: its name in the new model.
        source: name of the tensor that it is made from, or whose place and dtype it has.
        transform: applied to the source; None: the source's bytes are copied as they are.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transform: Transform | None


def unit_cuts(checkpoint: Checkpoint, kept: Kept) -> dict[str, Cut]:
    """The cut of every tensor that shrinks when only ``kept`` stays of a checkpoint."""
    assert not {EXPERTS, EXPERT_NEURONS} <= kept.units.keys(), "experts and their neurons are cut one after the other"
    return {
        name: _cut_of(units, layer, owned, kept_K)
        for units, rows in ((checkpoint.structures[kind], rows) for kind, rows in kept.units.items())
        for layer, kept_K in zip(kept.layers, rows, strict=True)
        if units.counts[layer]
        for name, owned in units.in_layer(layer, checkpoint.tensors)
        if owned.unit is None
    }


def _cut_of(units: Units, layer: int, owned: Owned, kept_K: Tensor) -> Cut:
    """The cut of one of a layer's tensors that leaves only the units ``kept_K``, equally many of every expert."""
    if owned.expert is None and not owned.stacked:
        return Cut(owned.axis, entries_of(kept_K, owned.per_unit, owned.parts, units.counts[layer]))
    width, of_experts = units.counts[layer] // units.parts, kept_K.chunk(units.parts)
    if owned.expert is not None:
        return Cut(owned.axis, of_experts[owned.expert] - width * owned.expert)
    own = (entries_of(it - width * expert, owned.per_unit, owned.parts, width) for expert, it in enumerate(of_experts))
    return Cut(owned.axis, torch.stack(list(own)))


def kept_names(checkpoint: Checkpoint, kept: Kept) -> dict[str, str]:
    """Name of every tensor that stays -> its name in the smaller checkpoint, as layers and experts are renumbered."""
    prefix = f"{checkpoint.family.layers}."
    numbers = {str(layer): str(number) for number, layer in enumerate(kept.layers)}
    names = {}
    for name in checkpoint.tensors:
        layer, _, part = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            names[name] = name
        elif layer in numbers:
            names[name] = f"{prefix}{numbers[layer]}.{part}"
    for units, rows in ((checkpoint.structures[kind], rows) for kind, rows in kept.units.items()):
        for layer_number, kept_K in zip(kept.layers, rows, strict=True):
            places = {unit: number for number, unit in enumerate(kept_K.tolist())}
            for name, owned in units.in_layer(layer_number, checkpoint.tensors):
                if owned.unit is not None:
                    new = names.pop(name)
                    names |= {name: owned.numbered(new, places[owned.unit])} if owned.unit in places else {}
    return names


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
    given, names, cuts = replacements or {}, kept_names(checkpoint, kept), unit_cuts(checkpoint, kept)
    ranks = {
        checkpoint.units.tensor(layer, projection): rank
        for projection, row in kept.ranks.items()
        for layer, rank in zip(kept.layers, row, strict=True)
    }
    written: list[Written] = []
    transform: Transform | None
    for name, info in checkpoint.tensors.items():
        if info.file != file or name not in names:
            continue
        module, _, part = name.rpartition(".")
        new = names[name].removesuffix(f".{part}")
        if module in ranks and part == "weight":
            shapes = factor_shapes(info.shape, ranks[module])
            pairs = ((factor, partial(_replace, given[f"{module}.{factor}.weight"])) for factor in FACTORS)
            written += [
                Written(f"{new}.{factor}.weight", name, shape, transform)
                for (factor, transform), shape in zip(pairs, shapes, strict=True)
            ]
            continue
        if module in ranks:
            new = f"{new}.{FACTORS[-1]}"
        shape, transform = tuple(info.shape), None
        if name in cuts:
            shape, transform = cuts[name].shape(info.shape), cuts[name].apply
        if name in given:
            transform = partial(_replace, given[name])
        written.append(Written(f"{new}.{part}" if module else names[name], name, shape, transform))
        bias = f"{module}.bias"
        if part == "weight" and bias in given and bias not in checkpoint.tensors:
            written.append(Written(f"{new}.bias", name, shape[:1], partial(_replace, given[bias])))
    added = any(name.endswith(".bias") and name not in checkpoint.tensors for name in given)
    stored = checkpoint.names if is_plain(checkpoint, kept.shape) and not added else SAME
    if written:
        stream_weight_file(checkpoint, file, written, target, stored)


def _replace(read: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    return read().to(tensor.dtype)


def stream_weight_file(
    checkpoint: Checkpoint, file: str, written: Sequence[Written], target: Path, stored: StoredNames
) -> None:
    """Write one safetensors file, transforming each tensor while the previous one is written.

    Peak memory is what one transform needs plus the previous transformed tensor.

    Args:
        stored: the names of tensors in the new file.
    """
    path = checkpoint.path / file
    with (
        naming(target / file),
        safe_open(path, framework="pt") as source,
        path.open("rb") as raw,
        (target / file).open("wb") as stream,
    ):

        def transformed(name: str, transform: Transform) -> Tensor:
            return transform(source.get_tensor(checkpoint.names.in_files(name))).contiguous()

        tensors = _one_ahead(partial(transformed, it.source, it.transform) for it in written if it.transform)
        stream.write(_header(checkpoint, written, stored))
        for it in written:
            if it.transform:
                stream.write(next(tensors).view(torch.uint8).numpy().data)
            else:
                info = checkpoint.tensors[it.source]
                raw.seek(info.offset)
                _copy(raw, stream, info.bytes)


def _one_ahead(makers: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """Yield each maker's tensor, in order; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for make in makers:
            coming = pool.submit(make)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def _header(checkpoint: Checkpoint, written: Sequence[Written], names: StoredNames) -> bytes:
    """The beginning of a safetensors file: the length of a JSON object, and that object."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for it in written:
        info = checkpoint.tensors[it.source]
        end = offset + info.bytes // info.numel * math.prod(it.shape)
        place = {"dtype": info.dtype, "shape": list(it.shape), "data_offsets": [offset, end]}
        header[names.in_files(it.name)] = place
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes, as the format asks
    return struct.pack("<Q", len(encoded)) + encoded


def _copy(source: BufferedReader, stream: BinaryIO, size: int) -> None:
    """Copy the next ``size`` bytes, through a buffer that stays in a core's cache."""
    buffer = memoryview(bytearray(min(size, COPY_BYTES)))
    while size:
        read = source.readinto(buffer[:size])
        if not read:
            raise OSError(f"{source.name}: it was cut short while being read")
        stream.write(buffer[:read])
        size -= read


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
        _write_tokenizer(checkpoint, target)
    stated = {key: it for key, it in checkpoint.config_file(config).items() if needs_ours or key != "auto_map"}
    write_config(stated, target)
    if needs_ours:
        shutil.copyfile(MODELING_FILE, target / MODELING_FILE.name)
    if (checkpoint.path / INDEX_FILE).is_file():
        files = [target / file for file in checkpoint.weight_files]
        infos = {name: it for file in files if file.is_file() for name, it in read_safetensors_header(file).items()}
        total = sum(info.bytes for info in infos.values())
        weight_map = {name: info.file for name, info in infos.items()}
        write_json(target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(checkpoint: Checkpoint, target: Path) -> None:
    """Replace the tokenizer's files with those that transformers saves after loading them.

    For some architectures, transformers makes a tokenizer by rules of its own and takes only the vocabulary from
    tokenizer.json; for others, it takes tokenizer.json as it is. Without this, a text would get other ids.
    """
    AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False).save_pretrained(target)

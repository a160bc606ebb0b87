"""Streaming a smaller copy of a checkpoint: tensor by tensor from file to file, never the whole model in memory."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.cut import Cut, StackedCut, cut_of
from hfprune_dist.checkpoints.older_names import write_config
from hfprune_dist.checkpoints.pruned_config import AUTO_CLASS, MODELING_FILE, is_plain
from hfprune_dist.checkpoints.read_tensors import DTYPES
from hfprune_dist.checkpoints.safetensors_header import TensorInfo, read_safetensors_header
from hfprune_dist.checkpoints.stored_names import SAME, StoredNames
from hfprune_dist.checkpoints.weight_files import INDEX_FILE
from hfprune_dist.errors import naming
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.low_rank import FACTORS, factor_shapes

COPY_BYTES = 256 * 1024

# A tensor as read -> the tensor to write, of the same dtype.
Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Written:
    """A tensor to write to a file.

    Attributes:
        name: its name in the new file.
        source: name of the tensor that it is made from.
        transform: applied to the source; None: the source's bytes are copied as they are.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transform: Transform | None


@dataclass(frozen=True)
class Changes:
    """Changes to tensors on their way from one file to another.

    Attributes:
        transforms: name -> what is applied to the tensor; the bytes of other tensors are copied as they are.
        shapes: name -> new shape, for tensors whose shape changes.
        names: name -> new name; tensors without one are left out. None: all keep their names.
        added: name of a tensor that doesn't exist yet -> its file, dtype and shape. ``transforms`` make it from an
            empty tensor.
        parts: name -> the tensors to write in its place, if these are several.
        stored: the names of tensors in the new file.
    """

    transforms: Mapping[str, Transform]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    names: Mapping[str, str] | None = None
    added: Mapping[str, TensorInfo] = field(default_factory=dict)
    parts: Mapping[str, Sequence[Written]] = field(default_factory=dict)
    stored: StoredNames = SAME

    def of(self, name: str, info: TensorInfo) -> Sequence[Written]:
        """The tensors to write for a tensor, or in its place."""
        if name in self.parts:
            return self.parts[name]
        new = name if self.names is None else self.names.get(name)
        shape = self.shapes.get(name, tuple(info.shape))
        return [] if new is None else [Written(new, name, shape, self.transforms.get(name))]


def unit_cuts(checkpoint: Checkpoint, kept: Kept) -> dict[str, Cut | StackedCut]:
    """The cut of every tensor that shrinks when only ``kept`` stays of a checkpoint."""
    assert not {EXPERTS, EXPERT_NEURONS} <= kept.units.keys(), "experts and their neurons are cut one after the other"
    return {
        name: cut_of(units, layer, owned, kept_K)
        for units, rows in ((checkpoint.structures[kind], rows) for kind, rows in kept.units.items())
        for layer, kept_K in zip(kept.layers, rows, strict=True)
        if units.counts[layer]
        for name, owned in units.in_layer(layer, checkpoint.tensors)
        if owned.unit is None
    }


def kept_names(checkpoint: Checkpoint, kept: Kept, added: Iterable[str] = ()) -> dict[str, str]:
    """Name of every tensor that stays or is added, with ``checkpoint``'s numbers of layers and units -> its name in the
    smaller checkpoint.
    """
    names = _of_kept_layers(checkpoint, kept.layers, added)
    for units, rows in ((checkpoint.structures[kind], rows) for kind, rows in kept.units.items()):
        for layer, kept_K in zip(kept.layers, rows, strict=True):
            numbers = {unit: number for number, unit in enumerate(kept_K.tolist())}
            for name, owned in units.in_layer(layer, checkpoint.tensors):
                if owned.unit is not None:
                    new = names.pop(name)
                    names |= {name: owned.numbered(new, numbers[owned.unit])} if owned.unit in numbers else {}
    return names


def _of_kept_layers(checkpoint: Checkpoint, layers: Sequence[int], added: Iterable[str]) -> dict[str, str]:
    prefix = f"{checkpoint.family.layers}."
    numbers = {str(layer): str(number) for number, layer in enumerate(layers)}
    every = {*checkpoint.tensors, *added}
    names = {name: name for name in checkpoint.tensors if not name.startswith(prefix)}
    for name in every - names.keys():
        layer, _, part = name.removeprefix(prefix).partition(".")
        if layer in numbers:
            names[name] = f"{prefix}{numbers[layer]}.{part}"
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
            same shape. A bias that ``checkpoint`` lacks, under the name it would have there, is written after the other
            tensors of its weight's file. A projection given a low rank has one entry for each factor.
    """
    added = _biases_added(checkpoint, replacements or {})
    names = kept_names(checkpoint, kept, added)
    factors, biases = _factored(checkpoint, kept, names, replacements or {})
    if not any(checkpoint.tensors[name].file == file for name in names if name not in added):
        return
    cuts = unit_cuts(checkpoint, kept)
    shapes = {name: cut.shape(checkpoint.tensors[name].shape) for name, cut in cuts.items()}
    transforms: dict[str, Transform] = {name: cut.apply for name, cut in cuts.items()}
    for name, read in (replacements or {}).items():
        transforms[name] = partial(_replace, read)
    stored = checkpoint.names if is_plain(checkpoint, kept.shape) and not added else SAME
    stream_weight_file(checkpoint, file, Changes(transforms, shapes, names | biases, added, factors, stored), target)


def _biases_added(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, TensorInfo]:
    """The named biases that the checkpoint lacks: of the same file and dtype as their weights, but vectors."""
    added = {}
    for name in names:
        if name.endswith(".bias") and name not in checkpoint.tensors:
            weight = checkpoint.tensors[f"{name.removesuffix('.bias')}.weight"]
            outputs = weight.shape[0]
            added[name] = replace(weight, shape=(outputs,), bytes=weight.bytes // weight.numel * outputs)
    return added


def _factored(
    checkpoint: Checkpoint, kept: Kept, names: Mapping[str, str], replacements: Mapping[str, Callable[[], Tensor]]
) -> tuple[dict[str, list[Written]], dict[str, str]]:
    """For projections given a low rank: name of the weight -> its factors, and name of the bias -> its new name."""
    factors, biases = {}, {}
    for projection, ranks in kept.ranks.items():
        for layer, rank in zip(kept.layers, ranks, strict=True):
            own = checkpoint.units.tensor(layer, projection)
            new = names[f"{own}.weight"].removesuffix(".weight")
            shapes = factor_shapes(checkpoint.tensors[f"{own}.weight"].shape, rank)
            factors[f"{own}.weight"] = [
                Written(
                    f"{new}.{factor}.weight",
                    f"{own}.weight",
                    shape,
                    partial(_replace, replacements[f"{own}.{factor}.weight"]),
                )
                for factor, shape in zip(FACTORS, shapes, strict=True)
            ]
            if f"{own}.bias" in names:
                biases[f"{own}.bias"] = f"{new}.{FACTORS[-1]}.bias"
    return factors, biases


def _replace(read: Callable[[], Tensor], tensor: Tensor) -> Tensor:
    return read().to(tensor.dtype)


def stream_weight_file(checkpoint: Checkpoint, file: str, changes: Changes, target: Path) -> None:
    """Write one safetensors file with some tensors transformed, each of them while the previous one is written.

    Peak memory is what one transform needs plus the previous transformed tensor.
    """
    every = {**checkpoint.tensors, **changes.added}
    infos = {name: info for name, info in every.items() if info.file == file}
    written = [it for name, info in infos.items() for it in changes.of(name, info)]
    path = checkpoint.path / file
    with (
        naming(target / file),
        safe_open(path, framework="pt") as source,
        path.open("rb") as raw,
        (target / file).open("wb") as stream,
    ):

        def transformed(name: str, transform: Transform) -> Tensor:
            like = changes.added.get(name)
            if like is not None:
                return transform(torch.empty(0, dtype=DTYPES[like.dtype])).contiguous()
            return transform(source.get_tensor(checkpoint.names.in_files(name))).contiguous()

        tensors = _one_ahead(partial(transformed, it.source, it.transform) for it in written if it.transform)
        stream.write(_header(infos, written, changes.stored))
        for it in written:
            if it.transform:
                stream.write(next(tensors).view(torch.uint8).numpy().data)
            else:
                raw.seek(infos[it.source].offset)
                _copy(raw, stream, infos[it.source].bytes)


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


def _header(infos: Mapping[str, TensorInfo], written: Sequence[Written], names: StoredNames) -> bytes:
    """The beginning of a safetensors file: the length of a JSON object, and that object."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for it in written:
        info = infos[it.source]
        size = info.bytes // info.numel * math.prod(it.shape)
        header[names.in_files(it.name)] = {
            "dtype": info.dtype,
            "shape": list(it.shape),
            "data_offsets": [offset, offset + size],
        }
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

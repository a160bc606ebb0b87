"""Files of tensors with a checksum, so that a later attempt uses only what an earlier one wrote completely."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfprune_dist.errors import naming
from hfprune_dist.store.atomic_files import publish

# The only entry of a header's metadata: safetensors writes several entries in an order that changes each time.
ABOUT = "about"


class DamagedFileError(Exception):
    """A file is cut short, or its content is not what was written; the message says which."""


def save_tensors(tensors: Mapping[str, Tensor], file: Path, texts: Mapping[str, str] | None = None) -> None:
    """Replace a safetensors file, with ``texts`` in its header, atomically and durably."""
    about = {"texts": dict(texts or {}), "crc32": _checksum(tensors, texts or {})}
    draft = file.with_suffix(".draft")
    with naming(file):
        save_file(dict(tensors), draft, {ABOUT: json.dumps(about, sort_keys=True)})
    publish(draft, file)


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the texts that ``save_tensors`` wrote; a DamagedFileError if the file holds anything else now."""
    try:
        about = _about(file)
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise DamagedFileError(f"is cut short or not a safetensors file of ours ({error})") from None
    if about["crc32"] != _checksum(tensors, about["texts"]):
        raise DamagedFileError("has other content than was written to it")
    return tensors, about["texts"]


def header_texts(file: Path) -> dict[str, str]:
    """The texts that ``save_tensors`` wrote, without reading the tensors."""
    return dict(_about(file)["texts"])


def _about(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as stream:
        return dict(json.loads((stream.metadata() or {})[ABOUT]))


def load_usable(file: Path) -> dict[str, Tensor] | None:
    """The tensors in a file that an earlier attempt left intact; None if there is none, or a damaged one."""
    if not file.is_file():
        return None
    try:
        return load_tensors(file)[0]
    except DamagedFileError as error:
        print(f"{file}: {error}; what it held is computed again", flush=True)
        return None


def is_usable(file: Path) -> bool:
    """Whether an earlier attempt left this file intact."""
    return load_usable(file) is not None


def _checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """CRC-32 over names, dtypes, shapes, texts and bytes."""
    kinds = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())]
    crc = zlib.crc32(json.dumps([kinds, sorted(texts.items())]).encode())
    for _, tensor in sorted(tensors.items()):
        crc = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


class SavedLayers:
    """Tensors of finished layers, among ``layers``, from which a later attempt resumes: one file for each, written by
    the rank that has the layer.
    """

    def __init__(self, folder: Path, layers: Iterable[int]) -> None:
        self._folder = folder
        self._layers = tuple(layers)

    def done(self) -> set[int]:
        """Layers that have a file; damaged ones are made again."""
        return {number for number in self._layers if self.is_done(number)}

    def is_done(self, number: int) -> bool:
        """Whether a layer has an intact file; a damaged one is made again."""
        return is_usable(self._file(number))

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the tensors of one layer, under names that no other layer uses."""
        self._folder.mkdir(exist_ok=True)
        save_tensors(tensors, self._file(number))

    def names(self, number: int) -> list[str]:
        """Names of the tensors of a finished layer."""
        with safe_open(self._file(number), framework="pt") as source:
            return list(source.keys())

    def tensor(self, number: int, name: str) -> Tensor:
        """One tensor of a finished layer, without reading the others."""
        with safe_open(self._file(number), framework="pt") as source:
            found: Tensor = source.get_tensor(name)
        return found

    def _file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"

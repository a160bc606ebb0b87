"""The files of a checkpoint's folder, read without torch: safetensors headers, their index, and JSON objects."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hfprune_dist.errors import UserError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Types of numbers, by the file format's names. Any other type means quantized weights.
FLOATS = ("F64", "F32", "F16", "BF16")
_POINTER = b"version https://git-lfs.github.com/"
# Weight files in other formats -> what to do about them.
_FOREIGN_WEIGHTS = {
    "*.gguf": "GGUF, the format of llama.cpp; take the safetensors checkpoint that it was made from",
    "pytorch_model*.bin": "pickled weights; load them with transformers' from_pretrained(..., dtype='auto') and "
    "save_pretrained, and the tokenizer likewise",
    "*.pth": "weights in their publisher's own format; convert them with transformers' convert_*_weights_to_hf.py",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: its dtype by the format's own name, and where its bytes begin."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def refuse_pointer(file: Path) -> None:
    """Refuse a Git LFS pointer, a short text in place of a large file that was not fetched."""
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{file}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned")


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, which must be whole."""
    try:
        refuse_pointer(file)
        with safe_open(file, framework="numpy"):  # which checks that the file is whole, but tells no places
            pass
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; download the checkpoint again") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from None
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        place = 8 + header_bytes + begin
        tensors[name] = TensorInfo(file.name, entry["dtype"], tuple(entry["shape"]), place, end - begin)
    return tensors


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of all weight files in a folder: a single file, or those listed in an index."""
    index = path / INDEX_FILE
    weight_map = read_json_object(index).get("weight_map") if index.is_file() else {}
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map must give the file of every tensor; download it again")
    tensors: dict[str, TensorInfo] = {}
    files = _weight_files(path, sorted(set(weight_map.values())))
    for file in files:
        for name, info in read_safetensors_header(path / file).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is in two files, {tensors[name].file} and {file}")
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{index}: tensor {name} should be in {file}, which lacks it; download again")
    if not tensors:
        raise UserError(f"{path}: no tensors in {', '.join(files)}; download it again")
    return tensors


def _weight_files(path: Path, indexed: list[str]) -> list[str]:
    if (path / SINGLE_FILE).is_file():
        if indexed not in ([], [SINGLE_FILE]):  # transformers would read the single file
            raise UserError(f"{path}: has both {SINGLE_FILE} and an {INDEX_FILE} that names other files; remove one")
        return [SINGLE_FILE]
    if indexed:
        return indexed
    for pattern, what in _FOREIGN_WEIGHTS.items():
        if foreign := matching(path, [pattern]):
            raise UserError(f"{path}: only safetensors weights are supported; {foreign[0]}: {what}")
    raise UserError(f"{path}: no {SINGLE_FILE} or {INDEX_FILE}; only safetensors weights are supported")


def matching(path: Path, patterns: Iterable[str]) -> list[str]:
    """Names, relative to a folder, of its files that match any of the patterns."""
    found = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    return sorted(str(file.relative_to(path)) for file in found)


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file, and refuse anything else."""
    try:
        refuse_pointer(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; every Hugging Face checkpoint has one") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON in UTF-8 ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content

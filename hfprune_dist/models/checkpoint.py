"""Reading the files of a Hugging Face checkpoint without torch: which tensors, of what shape, where."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.models.families import Family, family_of

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")
# Small files that make a checkpoint complete; they are part of its identity and travel with every pruned copy.
COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_PATTERNS,
    "chat_template*",
    "modeling_pruned.py",
    "LICENSE*",
    "NOTICE*",
)
# Of rotary embeddings: saved with some checkpoints, computed by every model.
BUFFERS = "rotary_emb.inv_freq"
COMPARED_BYTES = 2**20


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


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors weights and a tokenizer, checked to be whole.

    Attributes:
        config: config.json; but where it ties a head that the files have with other values than the embedding, it says
            here that the head isn't tied, and the saved one counts, as it does for transformers.
        tensors: those that the model computes with.
        unused: names of the others in the files. They are no parameters, and pruning leaves them out.
        has_untied_head: whether ``config`` says otherwise than config.json.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    tensors: Mapping[str, TensorInfo]
    unused: tuple[str, ...] = ()
    has_untied_head: bool = False

    @cached_property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @cached_property
    def intermediate_size(self) -> int:
        """Neurons of the widest layer."""
        return max(self.intermediate_sizes)

    @cached_property
    def intermediate_sizes(self) -> list[int]:
        """Neurons of each layer; layers differ where the config has a ``per_layer_config``."""
        own = self.config.get("per_layer_config") or {}
        everywhere = int(self.config["intermediate_size"])
        return [int(own.get(str(layer), {}).get("intermediate_size", everywhere)) for layer in range(self.num_layers)]

    @cached_property
    def is_uniform(self) -> bool:
        return len(set(self.intermediate_sizes)) == 1

    @cached_property
    def parameters(self) -> int:
        """Number of distinct parameters; a head tied to the embedding counts once."""
        tied_head = self.family.head_tensor() if self.config.get("tie_word_embeddings") else None
        return sum(info.numel for name, info in self.tensors.items() if name != tied_head)

    @cached_property
    def parameters_per_neuron(self) -> int:
        """Parameters that go when one neuron of one layer goes."""
        owned = [self.tensors[self.family.column_tensor(0)]]
        owned += [self.tensors[name] for name in self.family.row_tensors(0) if name in self.tensors]
        return sum(info.numel for info in owned) // self.intermediate_sizes[0]

    @cached_property
    def surplus(self) -> list[str]:
        """The unused tensors that aren't buffers which any model computes for itself."""
        return [name for name in self.unused if not name.endswith(BUFFERS)]

    @cached_property
    def remarks(self) -> list[str]:
        """What the owner of the checkpoint may not expect, in sentences."""
        told = []
        if self.has_untied_head:
            told.append(
                f"config.json ties the head, but {self.family.head_tensor()} differs from the embedding: the saved "
                "head counts, as in transformers, and pruned checkpoints say tie_word_embeddings false; other "
                "libraries may ignore it, so set that in config.json too, or remove the tensor"
            )
        if self.surplus:
            named = ", ".join(self.surplus[:3]) + (", ..." if len(self.surplus) > 3 else "")
            told.append(
                f"{len(self.surplus)} tensors in its files are no part of the model that config.json describes: they "
                f"aren't counted, and pruned checkpoints lack them ({named})"
            )
        return told

    @cached_property
    def weight_files(self) -> list[str]:
        return sorted({info.file for info in self.tensors.values()})

    @cached_property
    def companion_files(self) -> list[str]:
        return _matching(self.path, COMPANION_PATTERNS)

    @cached_property
    def tokenizer_files(self) -> list[str]:
        return _matching(self.path, TOKENIZER_PATTERNS)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's config and safetensors headers, and check that nothing is missing or cut short.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a Hugging Face checkpoint folder (config.json, *.safetensors)")
    config = _read_json(path / "config.json", "every Hugging Face checkpoint has one")
    family = family_of(config, str(path / "config.json"))
    if config.get("quantization_config"):
        raise UserError(f"{path / 'config.json'}: quantized weights can't be pruned; use the unquantized checkpoint")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} is needed")
    _check_config(config, path / "config.json")
    found = {name: info for file in _weight_files(path) for name, info in read_safetensors_header(path / file).items()}
    known = family.tensors(config)
    tensors = {name: info for name, info in found.items() if name in known}
    unused = tuple(sorted(found.keys() - known))
    _check_tensors(path, config, known, family, tensors)
    untied = bool(config.get("tie_word_embeddings")) and _heads_differ(path, family, tensors)
    checkpoint = Checkpoint(
        path, config | ({"tie_word_embeddings": False} if untied else {}), family, tensors, unused, untied
    )
    _check_mlp_shapes(checkpoint)
    return checkpoint


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is there, as long as its header says."""
    try:
        read_safetensors_header(file)
    except UserError:
        return False
    return True


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file, and check that the file is as long as its header says.

    Raises:
        UserError: where the file is missing, damaged or truncated.
    """
    try:
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_bytes))
        size = file.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{file}: missing; download the checkpoint again") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except (struct.error, ValueError, OverflowError, MemoryError):
        raise UserError(f"{file}: not a whole safetensors file (its header is damaged); download it again") from None
    data = 8 + header_bytes
    try:
        tensors = {name: _tensor_info(file.name, data, it) for name, it in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: its header is not that of a safetensors file; download it again") from None
    expected = max((info.offset + info.bytes for info in tensors.values()), default=data)
    if size != expected:
        raise UserError(f"{file}: {size:,} bytes, but its header announces {expected:,}; truncated? download it again")
    return tensors


def _matching(path: Path, patterns: Iterable[str]) -> list[str]:
    """Names of the files of a folder that match any of the patterns."""
    return sorted({file.name for pattern in patterns for file in path.glob(pattern) if file.is_file()})


def _tensor_info(file: str, data: int, entry: Mapping[str, Any]) -> TensorInfo:
    """Read a header's entry; offsets in it count from ``data``, the end of the header."""
    begin, end = entry["data_offsets"]
    return TensorInfo(file, entry["dtype"], tuple(entry["shape"]), data + begin, end - begin)


def _weight_files(path: Path) -> list[str]:
    if (path / INDEX_FILE).is_file():
        weight_map = _read_json(path / INDEX_FILE, "").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{path / INDEX_FILE}: weight_map must give the file of every tensor; download it again")
        return sorted(set(weight_map.values()))
    if (path / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    raise UserError(f"{path}: no {SINGLE_FILE} or {INDEX_FILE}; only safetensors weights are supported")


def _read_json(file: Path, why: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing" + (f"; {why}" if why else "")) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """The numbers that say which tensors there must be, and of what shape."""
    for key in ("num_hidden_layers", "intermediate_size", "hidden_size"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{file}: {key} must be a positive integer, not {value!r}")
    own = config.get("per_layer_config") or {}
    if not isinstance(own, dict) or not all(isinstance(it, dict) for it in own.values()):
        raise UserError(f"{file}: per_layer_config must give each layer's number its settings")


def _check_tensors(
    path: Path, config: Mapping[str, Any], known: set[str], family: Family, tensors: Mapping[str, TensorInfo]
) -> None:
    """All tensors of the model must be there; transformers makes up what is missing, at random."""
    needed = known - {family.head_tensor()} if config.get("tie_word_embeddings") else known
    missing = sorted(needed - tensors.keys())
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(f"{path}: tensor {missing[0]}{more} is missing from the weight files")
    embedding = tensors[family.embedding_tensor()]
    stated = [config.get("vocab_size", embedding.shape[0]), config["hidden_size"]]
    if list(embedding.shape) != stated:
        raise UserError(
            f"{path}: {family.embedding_tensor()} has shape {list(embedding.shape)}, but config.json says "
            f"vocab_size and hidden_size {stated}"
        )


def _heads_differ(path: Path, family: Family, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a head is saved beside the embedding that it is said to be tied to, with other values."""
    embedding, head = tensors[family.embedding_tensor()], tensors.get(family.head_tensor())
    if head is None:
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    with (path / head.file).open("rb") as one, (path / embedding.file).open("rb") as other:
        one.seek(head.offset)
        other.seek(embedding.offset)
        sizes = (min(COMPARED_BYTES, head.bytes - done) for done in range(0, head.bytes, COMPARED_BYTES))
        return any(one.read(size) != other.read(size) for size in sizes)


def _check_mlp_shapes(checkpoint: Checkpoint) -> None:
    """Every layer's MLP must have the width that the config states."""
    family = checkpoint.family
    for layer, width in enumerate(checkpoint.intermediate_sizes):
        column = family.column_tensor(layer)
        rows = [name for name in family.row_tensors(layer) if name.endswith(".weight")]
        for name, dimension in [(column, 1), *((row, 0) for row in rows)]:
            info = checkpoint.tensors[name]
            if len(info.shape) != 2 or info.shape[dimension] != width:
                raise UserError(
                    f"{checkpoint.path}: {name} has shape {list(info.shape)}, but config.json says "
                    f"intermediate_size {width} for this layer"
                )

"""Reading the files of a Hugging Face checkpoint without torch: which tensors, of what shape, where."""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.families import Family, family_of
from hfprune_dist.checkpoints.lfs_pointers import refuse_pointer
from hfprune_dist.errors import UserError

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
# What some architectures do to logits after their head -> the value that does nothing. A head is its weights here.
_AFTER_THE_HEAD = {"logits_scaling": 1, "logit_scale": 1, "lm_head_multiplier": 1, "final_logit_softcapping": None}
# Of rotary embeddings: saved with some checkpoints, computed by every model.
BUFFERS = "rotary_emb.inv_freq"
COMPARED_BYTES = 2**20
# Bytes of a number, by the file format's name of its type. Other types are those of quantized weights.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Files of weights in other formats -> what to do about them.
_FOREIGN_WEIGHTS = {
    "*.gguf": "GGUF, the format of llama.cpp; take the safetensors checkpoint that it was made from",
    "pytorch_model*.bin": (
        'pickled weights; convert them with python -c "from transformers import AutoModelForCausalLM, AutoTokenizer; '
        "[kind.from_pretrained('{path}', **options).save_pretrained('{path}-safetensors') for kind, options in "
        "((AutoModelForCausalLM, dict(dtype='auto')), (AutoTokenizer, dict()))]\""
    ),
    "*.pth": "weights in their publisher's own format; convert them with the script convert_*_weights_to_hf.py of "
    "transformers",
}
# Kinds of rope scaling that make max_position_embeddings, or the original number, so many times larger.
_STRETCHING = ("linear", "dynamic", "yarn")


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
    def max_positions(self) -> int | None:
        """The longest sequence that the model's positions were made for, with those that a rope scaling adds; None
        where the config doesn't say.
        """
        stated: int | None = self.config.get("max_position_embeddings")
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
        stretches = rope.get("rope_type", rope.get("type")) in _STRETCHING
        if stated is None or not stretches or not isinstance(factor, int | float):
            return stated
        return max(stated, int((original if isinstance(original, int) else stated) * factor))

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
        owned = [self.tensors[self.family.down_tensor(0)]]
        owned += [self.tensors[name] for name in self.family.gate_up_tensors(0) if name in self.tensors]
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
    _check_folder(path)
    config = _read_json(path / "config.json", "every Hugging Face checkpoint has one")
    family = family_of(config, str(path / "config.json"))
    if config.get("quantization_config"):
        raise UserError(f"{path / 'config.json'}: quantized weights can't be pruned; use the unquantized checkpoint")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} is needed")
    _check_config(config, path / "config.json")
    found = _read_headers(path)
    known = family.tensors(config)
    tensors = {name: info for name, info in found.items() if name in known}
    unused = tuple(sorted(found.keys() - known))
    for name in _matching(path, COMPANION_PATTERNS):
        refuse_pointer(path / name)
    _check_dtypes(path, found, known)
    _check_tensors(path, config, known, family, tensors)
    untied = bool(config.get("tie_word_embeddings")) and _heads_differ(path, family, tensors)
    checkpoint = Checkpoint(
        path, config | ({"tie_word_embeddings": False} if untied else {}), family, tensors, unused, untied
    )
    _check_mlp_shapes(checkpoint)
    return checkpoint


def read_safetensors_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a safetensors file, and check that the file is as long as its header says.

    Raises:
        UserError: where the file is missing, damaged or truncated.
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


def _matching(path: Path, patterns: Iterable[str]) -> list[str]:
    """Names of the files of a folder that match any of the patterns."""
    return sorted({file.name for pattern in patterns for file in path.glob(pattern) if file.is_file()})


def _tensor_info(file: str, data: int, entry: Mapping[str, Any]) -> TensorInfo:
    """Read a header's entry; offsets in it count from ``data``, the end of the header."""
    begin, end = entry["data_offsets"]
    shape = tuple(operator.index(size) for size in entry["shape"])
    return TensorInfo(file, entry["dtype"], shape, data + operator.index(begin), operator.index(end - begin))


def _check_places(tensors: Iterable[TensorInfo], file: Path, data: int) -> None:
    """Tensors must follow one another from ``data``, each as long as its shape says."""
    for info in sorted(tensors, key=lambda info: (info.offset, info.bytes)):
        is_long_enough = info.dtype not in FLOATS or info.bytes == info.numel * FLOATS[info.dtype]
        if info.offset != data or not is_long_enough:
            raise UserError(f"{file}: its header contradicts itself about where tensors are; download it again")
        data += info.bytes


def _check_folder(path: Path) -> None:
    """Refuse what is taken for a checkpoint's folder by mistake."""
    wanted = "give a Hugging Face checkpoint folder (config.json, *.safetensors)"
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: not a folder; {wanted}")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; {wanted}")
    snapshots = sorted(path.glob("snapshots/*/config.json"))
    if snapshots:
        raise UserError(f"{path}: a folder of the hub cache; give the snapshot in it: {snapshots[-1].parent}")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: a LoRA adapter (adapter_config.json); merge it into its base (peft's merge_and_unload, then "
            "save_pretrained) and give the folder of the result"
        )


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of all weight files."""
    weight_map = _weight_map(path)
    files = _weight_files(path, sorted(set(weight_map.values())))
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_safetensors_header(path / file).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is in two files, {tensors[name].file} and {file}")
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise UserError(f"{path / INDEX_FILE}: tensor {name} should be in {file}, which lacks it; download again")
    if not tensors:
        raise UserError(f"{path}: there are no tensors in {', '.join(files)}; download it again")
    return tensors


def _weight_files(path: Path, indexed: list[str]) -> list[str]:
    """Those that the index names, or the only one there is."""
    if (path / SINGLE_FILE).is_file():
        if indexed not in ([], [SINGLE_FILE]):  # transformers would read the single file
            raise UserError(f"{path}: has both {SINGLE_FILE} and {INDEX_FILE} of other files; remove one of them")
        return [SINGLE_FILE]
    if indexed:
        return indexed
    for pattern, what in _FOREIGN_WEIGHTS.items():
        if foreign := _matching(path, [pattern]):
            raise UserError(f"{path}: only safetensors weights are supported; {foreign[0]}: {what.format(path=path)}")
    raise UserError(f"{path}: no {SINGLE_FILE} or {INDEX_FILE}; only safetensors weights are supported")


def _weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor, by the index; nothing where there is none."""
    if not (path / INDEX_FILE).is_file():
        return {}
    weight_map = _read_json(path / INDEX_FILE, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(file) for file in weight_map.values()):
        raise UserError(f"{path / INDEX_FILE}: weight_map must give the file of every tensor; download it again")
    return weight_map


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _read_json(file: Path, why: str) -> dict[str, Any]:
    try:
        refuse_pointer(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing" + (f"; {why}" if why else "")) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; download it again") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object")
    return content


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """The numbers that say which tensors there must be, and of what shape."""
    for key in ("num_hidden_layers", "intermediate_size", "hidden_size", "num_attention_heads"):
        _require_positive(config.get(key), key, file)
    for key in ("vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if key == "vocab_size" or config.get(key) is not None:
            _require_positive(config.get(key), key, file)
    heads, key_value_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if heads % (key_value_heads or heads):
        raise UserError(f"{file}: num_attention_heads {heads} is no multiple of num_key_value_heads {key_value_heads}")
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise UserError(f"{file}: hidden_size {config['hidden_size']} is no multiple of num_attention_heads {heads}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{file}: rope_parameters and rope_scaling must be objects, not {rope!r}")
    for key, neutral in _AFTER_THE_HEAD.items():
        if config.get(key) not in (None, neutral):
            raise UserError(f"{file}: {key} {config[key]!r} changes the logits, which is not supported yet")
    own = config.get("per_layer_config") or {}
    if not isinstance(own, dict) or not all(isinstance(it, dict) for it in own.values()):
        raise UserError(f"{file}: per_layer_config must give each layer's number its settings")
    for settings in own.values():
        _require_positive(settings.get("intermediate_size", 1), "intermediate_size in per_layer_config", file)


def _require_positive(value: Any, key: str, file: Path) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key} must be a positive integer, not {value!r}")


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
    stated = [config["vocab_size"], config["hidden_size"]]
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


def _check_dtypes(path: Path, found: Mapping[str, TensorInfo], known: set[str]) -> None:
    """Whatever a module of the model has must be floating-point numbers of 16 bits or more."""
    modules = {_module_of(name) for name in known}
    for name, info in found.items():
        if _module_of(name) in modules and info.dtype not in FLOATS:
            raise UserError(
                f"{path}: {name} is of type {info.dtype}: quantized weights can't be pruned; use the "
                f"unquantized checkpoint ({', '.join(FLOATS)})"
            )


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _check_mlp_shapes(checkpoint: Checkpoint) -> None:
    """Every layer's MLP must have the width that the config states."""
    family = checkpoint.family
    for layer, width in enumerate(checkpoint.intermediate_sizes):
        column = family.down_tensor(layer)
        rows = [name for name in family.gate_up_tensors(layer) if name.endswith(".weight")]
        for name, dimension in [(column, 1), *((row, 0) for row in rows)]:
            info = checkpoint.tensors[name]
            if len(info.shape) != 2 or info.shape[dimension] != width:
                raise UserError(
                    f"{checkpoint.path}: {name} has shape {list(info.shape)}, but config.json says "
                    f"intermediate_size {width} for this layer"
                )

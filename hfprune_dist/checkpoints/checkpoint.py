"""A Hugging Face checkpoint's folder, opened without torch: its config, its tensors and its other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.discovery import discover
from hfprune_dist.checkpoints.families import NEEDED, Family, normalized, not_supported, refuse_other_kinds
from hfprune_dist.checkpoints.stored_names import SAME, StoredNames
from hfprune_dist.checkpoints.text_decoder import KNOWN, beside_decoder, decoder_config, has_vision, with_decoder
from hfprune_dist.checkpoints.weight_files import (
    FLOATS,
    TensorInfo,
    matching,
    read_headers,
    read_json_object,
    refuse_pointer,
)
from hfprune_dist.errors import UserError
from hfprune_dist.structures import EXPERT_NEURONS, NEURONS, SHARED_NEURONS, Structure
from hfprune_dist.structures.kept import ParameterCounts
from hfprune_dist.structures.layout import Layout
from hfprune_dist.structures.low_rank import linear_modules
from hfprune_dist.structures.units import LAYER_SIZES, OUTPUT_BIASES, Units

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
# Small files that make a checkpoint complete; they are part of its identity and travel with every pruned copy. The last
# ones say how images become tokens.
COMPANION_PATTERNS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_PATTERNS,
    "modeling_pruned.py",
    "*processor_config.json",
)
# Globs for files that state a licence: words that are part of their names, in any case.
LICENCE_PATTERNS = tuple(
    "*" + "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in word) + "*"
    for word in ("license", "licence", "copying", "copyright", "notice", "use_policy")
)
# Files that travel with every pruned copy too, but that no result depends on, so that they aren't part of its identity:
# licences, named chat templates, code for a tokenizer (which runs only with trust_remote_code), and the form of a
# tokenizer that transformers takes where mistral-common is installed.
UNREAD_PATTERNS = (*LICENCE_PATTERNS, "additional_chat_templates/*.jinja", "tokenization_*.py", "tekken.json")
COMPARED_BYTES = 2**20


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json, safetensors weights and a tokenizer, checked to be complete.

    Attributes:
        config: config.json's settings, with values for the keys that it lacks. If config.json ties the head, but the
            files have one whose values differ from the embedding's, the head isn't tied here and the saved one counts,
            as it does for transformers.
        tensors: the tensors that the model computes with, by their names in the model. Others in the files aren't
            parameters, and pruning leaves them out.
        names: the names of tensors in the files, where they differ from those in the model.
        whole: config.json, unchanged.
        bytes_on_disk: size of the files with its weights.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    tensors: Mapping[str, TensorInfo]
    names: StoredNames = SAME
    whole: Mapping[str, Any] = field(default_factory=dict)
    bytes_on_disk: int = 0

    @cached_property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @cached_property
    def units(self) -> Units:
        """The main units of the model: see ``Family.structures``."""
        return next(iter(self.structures.values()))

    @cached_property
    def structures(self) -> dict[str, Units]:
        """All kinds of units in the model, by name."""
        return self.family.structures(self.config)

    @cached_property
    def layout(self) -> Layout:
        """The axes that the model's tensors follow."""
        return self.family.layout(self.config, self.tensors)

    def pruned_kinds(self, structures: Iterable[Structure]) -> list[Units]:
        """The kinds of units that belong to some structures; those of MLPs first."""
        wanted: set[str] = {*structures}
        wanted |= {EXPERT_NEURONS, SHARED_NEURONS} if NEURONS in wanted else set()
        return [units for kind, units in self.structures.items() if kind in wanted]

    @cached_property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Name within a layer of every low-rank projection -> its rank in each layer."""
        return self.family.ranks(self.config)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all layers that have units of a kind have the same number of them."""
        return all(units.is_uniform for units in self.structures.values())

    @cached_property
    def is_plain(self) -> bool:
        """Whether transformers has a class for it: layers of the same sizes, no biases but those of its family."""
        return LAYER_SIZES not in self.config and not self.config.get(OUTPUT_BIASES)

    @cached_property
    def max_positions(self) -> int | None:
        """The longest sequence that config.json says the model is for, with rope scaling; None if it names none."""
        stated: int | None = self.config.get("max_position_embeddings")
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        stretches = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn")
        if stated is None or not stretches or not rope.get("factor"):
            return stated
        return max(stated, int((rope.get("original_max_position_embeddings") or stated) * rope["factor"]))

    @cached_property
    def parameter_counts(self) -> ParameterCounts:
        """Numbers of parameters in the model, in its layers and in their units."""
        tied_head = self.family.head_tensor if self.config.get("tie_word_embeddings") else None
        shapes = {name: info.shape for name, info in self.tensors.items()}
        return ParameterCounts(self.layout, shapes, self.structures, tied_head)

    @cached_property
    def parameters(self) -> int:
        """Number of distinct parameters; a head tied to the embedding counts once."""
        return self.parameter_counts.total

    @cached_property
    def parameters_per_unit(self) -> int:
        """Number of parameters that are removed with one unit of one layer."""
        return self.parameter_counts.units[self.units.kind]

    @cached_property
    def weight_files(self) -> list[str]:
        return sorted({info.file for info in self.tensors.values()})

    @cached_property
    def companion_files(self) -> list[str]:
        return matching(self.path, COMPANION_PATTERNS)

    @cached_property
    def travelling_files(self) -> list[str]:
        """Names, relative to its folder, of the files that a pruned copy has unchanged, config.json aside."""
        return sorted({*self.companion_files, *matching(self.path, UNREAD_PATTERNS)})

    def config_file(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of config.json for settings in the form of this checkpoint's ``config``."""
        return with_decoder(self.whole, config) if self.family.has_vision else dict(config)

    @cached_property
    def tokenizer_files(self) -> list[str]:
        return matching(self.path, TOKENIZER_PATTERNS)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's config and safetensors headers; refuse one in which something is missing or cut short."""
    _check_folder(path)
    file = path / "config.json"
    whole = read_json_object(file)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: no tokenizer; one of {', '.join(TOKENIZER_FILES)} is needed")
    try:
        checkpoint = _described(path, whole)
        float(checkpoint.max_positions or 0)  # rope settings of a wrong form are told here
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{file}: it can't be read as one of a {whole.get('model_type')} "
            f"({type(error).__name__}: {error}); if plain transformers loads the model, this is a fault of hfprune_dist"
        ) from error
    return checkpoint


def _described(path: Path, whole: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with this config.json, after checking that its files hold what it states."""
    file, vision = path / "config.json", has_vision(whole)
    if vision and whole.get("model_type") not in KNOWN:
        why = f"it is a vision-language model (vision_config), of which {', '.join(KNOWN)} can be pruned"
        raise not_supported(whole, str(file), why)
    config = normalized(decoder_config(whole) if vision else whole)
    refuse_other_kinds({**whole, **config}, str(file))
    _check_config({**whole, **config}, file)
    stored = read_headers(path)
    for name, info in stored.items():
        if ".layers." in name and info.dtype not in (*FLOATS, "I64", "BOOL") and not name.endswith("bias"):
            raise UserError(
                f"{path}: {name} is of type {info.dtype}: quantized weights can't be pruned; use the unquantized "
                f"checkpoint ({', '.join(FLOATS)})"
            )
    names = StoredNames.found(whole, stored)
    found = {names.in_modules(name): info for name, info in stored.items()}
    beside = beside_decoder(found) if vision else frozenset()
    shapes = {name: info.shape for name, info in found.items() if name not in beside}
    says_if_tied = config.get("tie_word_embeddings") is not None
    family, stated = discover(config, shapes, str(file), has_vision=vision)
    config |= stated
    _check_tensors(path, config, family, found)
    tensors = {name: info for name, info in found.items() if name in family.tensors | beside}
    # Configurations may not mention the default of their class; merged and gathered weights hold a copy of a tied head.
    may_be_tied = bool(config["tie_word_embeddings"]) or not says_if_tied
    config["tie_word_embeddings"] = may_be_tied and not _heads_differ(path, family, tensors)
    checkpoint = Checkpoint(
        path,
        config,
        family,
        tensors,
        names=names,
        whole=whole,
        bytes_on_disk=sum((path / name).stat().st_size for name in {info.file for info in stored.values()}),
    )
    for name in checkpoint.companion_files:
        refuse_pointer(path / name)
    return checkpoint


def _check_folder(path: Path) -> None:
    """Refuse a path that is given by mistake in place of a checkpoint's folder."""
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such folder"
        raise UserError(f"{path}: {what}; give a Hugging Face checkpoint folder (config.json, *.safetensors)")
    snapshots = sorted(path.glob("snapshots/*/config.json"))
    if snapshots:
        raise UserError(f"{path}: a folder of the hub cache; give the snapshot in it: {snapshots[-1].parent}")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: a LoRA adapter (adapter_config.json); merge it into its base (peft's merge_and_unload, then "
            "save_pretrained) and give the folder of the result"
        )


def _check_config(config: Mapping[str, Any], file: Path) -> None:
    """Check what determines which tensors there must be, and their shapes."""

    def require(key: str, holds: object, wanted: str, value: object) -> None:
        if not holds:
            raise UserError(f"{file}: {key} must be {wanted}, not {value!r}")

    if config.get("quantization_config"):
        raise UserError(
            f"{file}: quantized weights can't be pruned; use the unquantized checkpoint, or dequantize it with "
            "transformers' from_pretrained (quantization_config=Mxfp4Config(dequantize=True) or "
            "FineGrainedFP8Config(dequantize=True)) and save_pretrained"
        )
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    for key in (*NEEDED, *(key for key in optional if config.get(key) is not None)):
        require(key, type(config[key]) is int and config[key] > 0, "a positive integer", config[key])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads") or heads
    require("num_attention_heads", heads % groups == 0, f"a multiple of num_key_value_heads {groups}", heads)
    # Latent attention has sizes of its own for heads.
    divides = config.get("head_dim") or config.get("kv_lora_rank") or hidden % heads == 0
    require("hidden_size", divides, f"a multiple of num_attention_heads {heads}", hidden)


def _check_tensors(path: Path, config: Mapping[str, Any], family: Family, found: Mapping[str, TensorInfo]) -> None:
    """Refuse files without a tensor, which transformers would make up, or whose units' shapes aren't the config's."""
    needed = family.tensors - ({family.head_tensor} if config.get("tie_word_embeddings") else set())
    if missing := sorted(needed - found.keys()):
        raise UserError(f"{path}: tensor {missing[0]} is missing from the weight files ({len(missing)} in all)")
    ranks = family.ranks(config)
    for module in config.get(OUTPUT_BIASES, ()):
        bias = f"{linear_modules(module, ranks)[-1]}.bias"
        if not all(f"{family.layers}.{layer}.{bias}" in found for layer in range(config["num_hidden_layers"])):
            raise UserError(f"{path / 'config.json'}: {OUTPUT_BIASES} names {module}, but not all layers have a {bias}")
    check_shapes(path, found, family.structures(config), family.layout(config, found))


def check_shapes(
    path: Path, tensors: Mapping[str, TensorInfo], structures: Mapping[str, Units], layout: Layout
) -> None:
    """Check that every layer's tensors have the shapes that follow from the config's numbers of units."""
    for units in structures.values():
        for layer in (number for number, count in enumerate(units.counts) if count):
            for name in units.in_layer(layer, tensors):
                found = list(tensors[name].shape)
                if found != (wanted := layout.shape(name, found)):
                    stated = units.values([units.counts[layer]]).items()
                    raise UserError(
                        f"{path}: {name} has shape {found}, but config.json makes it {wanted}: "
                        f"{' and '.join(f'{field} {value}' for field, (value,) in stated)} for this layer"
                    )


def _heads_differ(path: Path, family: Family, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the files hold a head whose values differ from the embedding that it is said to be tied to."""
    embedding, head = tensors[family.embedding_tensor], tensors.get(family.head_tensor)
    if head is None:
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    with (path / head.file).open("rb") as one, (path / embedding.file).open("rb") as other:
        one.seek(head.offset)
        other.seek(embedding.offset)
        sizes = (min(COMPARED_BYTES, head.bytes - done) for done in range(0, head.bytes, COMPARED_BYTES))
        return any(one.read(size) != other.read(size) for size in sizes)


def is_licence(name: str) -> bool:
    """Whether a file of this name states a licence."""
    return any(fnmatchcase(name, pattern) for pattern in LICENCE_PATTERNS)

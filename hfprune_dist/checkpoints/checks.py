"""Checks of a checkpoint's folder, config.json and tensors before it is used, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.checkpoints.weight_files import FLOATS, TensorInfo
from hfprune_dist.errors import UserError
from hfprune_dist.structures import EXPERTS
from hfprune_dist.structures.low_rank import linear_modules
from hfprune_dist.structures.units import LAYER_SIZES, OUTPUT_BIASES, Units


def check_folder(path: Path) -> None:
    """Refuse a path that is given by mistake in place of a checkpoint's folder.

    Raises:
        UserError: saying what to give instead.
    """
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


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Check what determines which tensors there must be, and their shapes.

    Raises:
        UserError: naming the key, its value and what it must be.
    """
    if config.get("quantization_config"):
        raise UserError(
            f"{file}: quantized weights can't be pruned; use the unquantized checkpoint, or dequantize it with "
            "transformers' from_pretrained (quantization_config=Mxfp4Config(dequantize=True) or "
            "FineGrainedFP8Config(dequantize=True)) and save_pretrained"
        )
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    needed = ("num_hidden_layers", "intermediate_size", "hidden_size", "num_attention_heads", "vocab_size")
    for key in (*needed, *(key for key in optional if config.get(key) is not None)):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{file}: {key} must be a positive integer, not {value!r}")
    heads, key_value_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if heads % (key_value_heads or heads):
        raise UserError(
            f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {key_value_heads}"
        )
    # Latent attention has sizes of its own for heads.
    if not (config.get("head_dim") or config.get("kv_lora_rank")) and config["hidden_size"] % heads:
        raise UserError(f"{file}: hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}")
    for key in ("rope_parameters", "rope_scaling", LAYER_SIZES):
        if not isinstance(config.get(key) or {}, Mapping):
            raise UserError(f"{file}: {key} must be an object, not {config[key]!r}")
    for field, values in (config.get(LAYER_SIZES) or {}).items():
        are_sizes = isinstance(values, list) and all(type(it) is int and it >= 0 for it in values)
        if not are_sizes or len(values) != config["num_hidden_layers"]:
            wanted = f"a list of {config['num_hidden_layers']} integers, one for each layer"
            raise UserError(f"{file}: {LAYER_SIZES}.{field} must be {wanted}, not {values!r}")
    biased = config.get(OUTPUT_BIASES, [])
    if not isinstance(biased, list) or not all(isinstance(it, str) for it in biased):
        raise UserError(f"{file}: {OUTPUT_BIASES} must be a list of names of projections, not {biased!r}")


def check_tensors(path: Path, config: Mapping[str, Any], family: Family, found: Mapping[str, TensorInfo]) -> None:
    """Check that no tensor of the model is missing, since transformers would fill it with random values, and that those
    of units have the shapes that follow from the config's numbers of units.

    Args:
        found: all tensors in the files, by their names in the model.

    Raises:
        UserError: naming the tensor.
    """
    needed = family.tensors - ({family.head_tensor()} if config.get("tie_word_embeddings") else set())
    if missing := sorted(needed - found.keys()):
        raise UserError(f"{path}: tensor {first_of(missing)} is missing from the weight files")
    ranks = family.ranks(config)
    for module in config.get(OUTPUT_BIASES, ()):
        bias = f"{linear_modules(module, ranks)[-1]}.bias"
        if not all(f"{family.layers}.{layer}.{bias}" in found for layer in range(config["num_hidden_layers"])):
            raise UserError(f"{path / 'config.json'}: {OUTPUT_BIASES} names {module}, but not all layers have a {bias}")
    check_shapes(path, found, family.structures(config), config["hidden_size"])


def check_dtypes(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that tensors of layers are floating-point numbers of 16 bits or more, buffers aside.

    Raises:
        UserError: for quantized weights.
    """
    for name, info in tensors.items():
        if ".layers." in name and info.dtype not in (*FLOATS, "I64", "BOOL") and not name.endswith("bias"):
            raise UserError(
                f"{path}: {name} is of type {info.dtype}: quantized weights can't be pruned; use the "
                f"unquantized checkpoint ({', '.join(FLOATS)})"
            )


def first_of(missing: Sequence[str]) -> str:
    """The first of some missing tensors, and how many more there are."""
    return missing[0] + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")


def check_shapes(path: Path, tensors: Mapping[str, TensorInfo], structures: Mapping[str, Units], hidden: int) -> None:
    """Check that every layer's tensors have the shapes that follow from the config's numbers of units.

    Args:
        hidden: the hidden size, which is the other dimension of weights that units own parts of.

    Raises:
        UserError: naming the tensor.
    """
    for units in structures.values():
        for layer in (it for it, count in enumerate(units.counts) if count):
            for name, owned in units.in_layer(layer, tensors):
                found = list(tensors[name].shape)
                if units.kind != EXPERTS:
                    wanted = units.shape_of(owned, layer, hidden)
                else:  # whose other dimensions are checked with their neurons
                    size = found[owned.axis : owned.axis + 1] if owned.unit is not None else [units.counts[layer]]
                    wanted = [*found[: owned.axis], *size, *found[owned.axis + 1 :]]
                if found != wanted:
                    stated = units.values([units.counts[layer]]).items()
                    raise UserError(
                        f"{path}: {name} has shape {found}, but config.json makes it {wanted}: "
                        f"{' and '.join(f'{field} {value}' for field, (value,) in stated)} for this layer"
                    )

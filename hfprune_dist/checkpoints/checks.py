"""Checks of a checkpoint's folder, config.json and tensors before it is used, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.families import FAMILIES, Family
from hfprune_dist.checkpoints.safetensors_header import FLOATS, TensorInfo
from hfprune_dist.errors import UserError
from hfprune_dist.structures import EXPERTS
from hfprune_dist.structures.low_rank import FACTORS, factor_shapes, rank_field
from hfprune_dist.structures.units import LAYER_SIZES, OUTPUT_BIASES, Units

# Keys by which some architectures change their head's logits -> the neutral value. Listed architectures don't.
NEUTRAL_AFTER_HEAD = {
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
    "final_logit_softcapping": None,
}


def check_folder(path: Path) -> None:
    """Refuse a path that is given by mistake in place of a checkpoint's folder.

    Raises:
        UserError: saying what to give instead.
    """
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


def quantized(config: Mapping[str, Any], path: Path) -> UserError:
    """The error to raise for weights that a config.json calls quantized."""
    told = config["quantization_config"]
    method = told.get("quant_method") if isinstance(told, Mapping) else told
    loaded = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}.get(str(method))
    how = (
        "dequantize it first: load it with transformers' AutoModelForCausalLM.from_pretrained(..., "
        f"quantization_config={loaded}(dequantize=True)) and save_pretrained"
        if loaded
        else "use the unquantized checkpoint"
    )
    return UserError(f"{path / 'config.json'}: quantized weights can't be pruned; {how}")


def check_config(config: Mapping[str, Any], file: Path) -> None:
    """Check the numbers that determine which tensors there must be, and their shapes.

    Raises:
        UserError: naming the key, its value and what it must be.
    """
    for key in ("num_hidden_layers", "intermediate_size", "hidden_size", "num_attention_heads"):
        _require_positive(config.get(key), key, file)
    for key in ("vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if key == "vocab_size" or config.get(key) is not None:
            _require_positive(config.get(key), key, file)
    heads, key_value_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if heads % (key_value_heads or heads):
        raise UserError(
            f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {key_value_heads}"
        )
    # Latent attention has sizes of its own for heads.
    if not (config.get("head_dim") or config.get("kv_lora_rank")) and config["hidden_size"] % heads:
        raise UserError(f"{file}: hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{file}: rope_parameters and rope_scaling must be objects, not {rope!r}")
    for key, neutral in NEUTRAL_AFTER_HEAD.items():
        if config.get("model_type") in FAMILIES and config.get(key) not in (None, neutral):
            raise UserError(f"{file}: {key} {config[key]!r} changes the logits, which its architecture doesn't do")
    _check_layer_sizes(config, file)


def _check_layer_sizes(config: Mapping[str, Any], file: Path) -> None:
    sizes, layers = config.get(LAYER_SIZES) or {}, config["num_hidden_layers"]
    if not isinstance(sizes, dict) or not all(isinstance(it, list) and len(it) == layers for it in sizes.values()):
        raise UserError(f"{file}: {LAYER_SIZES} must give a list of {layers} numbers, one a layer, for each field")
    for field, values in sizes.items():
        for value in values:
            _require_positive(value, f"{field} in {LAYER_SIZES}", file)


def check_output_biases(config: Mapping[str, Any], family: Family, file: Path) -> None:
    """Check the output projections to which a checked config gives biases that they lack in its family.

    Raises:
        UserError: if it names other modules.
    """
    known = [*dict.fromkeys(units.output for units in family.structures(config).values())]
    named = config.get(OUTPUT_BIASES, [])
    if not isinstance(named, list) or any(name not in known for name in named) or len({*named}) < len(named):
        raise UserError(f"{file}: {OUTPUT_BIASES} must be a list of some of {', '.join(known)}, not {named!r}")


def _require_positive(value: Any, key: str, file: Path) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key} must be a positive integer, not {value!r}")


def check_dtypes(path: Path, found: Mapping[str, TensorInfo], known: set[str]) -> None:
    """Check that all tensors of the model's modules are floating-point numbers of 16 bits or more.

    Raises:
        UserError: for quantized weights.
    """
    modules = {_module_of(name) for name in known}
    for name, info in found.items():
        if _module_of(name) in modules and info.dtype not in FLOATS:
            raise UserError(
                f"{path}: {name} is of type {info.dtype}: quantized weights can't be pruned; use the "
                f"unquantized checkpoint ({', '.join(FLOATS)})"
            )


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def check_tensors(path: Path, config: Mapping[str, Any], family: Family, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that no tensor of the model is missing; transformers would fill missing ones with random values.

    Raises:
        UserError: naming the missing tensor, or an embedding whose shape isn't what the config says.
    """
    known = family.tensors(config)
    needed = known - {family.head_tensor()} if config.get("tie_word_embeddings") else known
    missing = sorted(needed - tensors.keys())
    if missing:
        raise UserError(f"{path}: tensor {first_of(missing)} is missing from the weight files")
    embedding = tensors[family.embedding_tensor()]
    stated = [config["vocab_size"], config["hidden_size"]]
    if list(embedding.shape) != stated:
        raise UserError(
            f"{path}: {family.embedding_tensor()} has shape {list(embedding.shape)}, but config.json says "
            f"vocab_size and hidden_size {stated}"
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
                    raise UserError(
                        f"{path}: {name} has shape {found}, but config.json makes it {wanted}: "
                        f"{units.described(layer)} for this layer"
                    )


def check_factors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    structures: Mapping[str, Units],
    ranks: Mapping[str, Sequence[int]],
    *,
    hidden: int,
) -> None:
    """Check that the factors of low-rank projections have the shapes that the config states.

    Raises:
        UserError: naming the tensor.
    """
    owners = {owned.tensor: (units, owned) for units in structures.values() for owned in units.owned}
    any_units = next(iter(structures.values()))
    for projection, row in ranks.items():
        for layer, rank in enumerate(row):
            names = [any_units.tensor(layer, f"{projection}.{factor}.weight") for factor in FACTORS]
            if odd := [name for name in names if len(tensors[name].shape) != 2]:
                raise UserError(f"{path}: {odd[0]} has shape {list(tensors[odd[0]].shape)}, which is not a matrix's")
            size: Sequence[int] = (tensors[names[1]].shape[0], tensors[names[0]].shape[1])
            if own := owners.get(f"{projection}.weight"):  # otherwise modules tell its size
                units, owned = own
                size = units.shape_of(owned, layer, hidden)
            for name, shape in zip(names, factor_shapes(size, rank), strict=True):
                if tuple(tensors[name].shape) != shape:
                    raise UserError(
                        f"{path}: {name} has shape {list(tensors[name].shape)}, but config.json makes it "
                        f"{list(shape)}: {rank_field(projection)} {rank} for this layer"
                    )

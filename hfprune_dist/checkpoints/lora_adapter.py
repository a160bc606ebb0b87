"""LoRA adapters on disk, in peft's format, and merging them into a checkpoint without holding the model in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import Family
from hfprune_dist.checkpoints.pruned_config import is_plain
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.stored_names import SAME
from hfprune_dist.checkpoints.write_pruned import Cut, Transform, Written, stream_weight_file, unit_cuts
from hfprune_dist.errors import UserError, naming
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.low_rank import linear_modules

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_PEFT_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of a model's weights: W + scale * B @ A.

    Attributes:
        scale: alpha / r.
        factors: name of a weight -> (A [r, in_features], B [out_features, r]).
    """

    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]


def lora_targets(family: Family, low_rank: Iterable[str] = ()) -> list[str] | str:
    """Names within a layer of the linear layers that get an adapter: all of attention and of MLPs, and both factors of
    those of low rank; or, where other parts of the model may use the same names, a pattern that matches only the
    decoder's. In mixtures of experts, only attention gets adapters: peft would take the names of MLP projections for
    the experts', whose adapters can't be merged matrix by matrix.

    Args:
        low_rank: names within a layer of its low-rank projections.
    """
    factored = dict.fromkeys(low_rank)
    names = [linear for name in family.adapted_attention for linear in linear_modules(name, factored)]
    if not family.experts:
        names += [".".join(filter(None, (family.mlp, it))) for it in (*family.row_projections, family.down_projection)]
    return rf"{re.escape(family.layers)}\.\d+\.({'|'.join(map(re.escape, names))})" if family.has_vision else names


def write_adapter(
    folder: Path, parameters: Mapping[str, Tensor], targets: Sequence[str] | str, rank: int, alpha: int
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained`` loads.

    Args:
        parameters: the LoRA parameters, by their names in a ``PeftModel``.
        targets: what ``lora_targets`` returns.
    """
    folder.mkdir()
    # The base model is left open: its path would differ from machine to machine.
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    write_json(folder / ADAPTER_CONFIG, config)
    weights = {name.replace(".default.weight", ".weight"): tensor for name, tensor in parameters.items()}
    with naming(folder / ADAPTER_WEIGHTS):
        save_file(weights, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter in peft's format (plain LoRA on linear layers)."""
    config = read_json(folder / ADAPTER_CONFIG)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    modules = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    factors = {
        f"{module.removeprefix(_PEFT_PREFIX)}.weight": (tensors[module + _A], tensors[module + _B])
        for module in modules
    }
    return Adapter(config["lora_alpha"] / config["r"], factors)


def merge_weight_file(
    checkpoint: Checkpoint, file: str, adapter: Adapter, target: Path, kept: Kept | None = None
) -> None:
    """Write one safetensors file of the checkpoint with the adapter merged into it; dtypes don't change.

    Args:
        kept: the units that all layers keep after merging; None: all, so that no shape changes.

    Raises:
        UserError: if a merged weight is NaN or infinite, and as ``as_stored`` does.
    """
    unknown = adapter.factors.keys() - checkpoint.tensors.keys()
    assert not unknown, f"the adapter has weights that the checkpoint lacks: {sorted(unknown)[:3]}"
    cuts = {} if kept is None else unit_cuts(checkpoint, kept)
    written = []
    transform: Transform | None
    for name, info in checkpoint.tensors.items():
        if info.file == file:
            cut = cuts.get(name)
            shape, transform = (tuple(info.shape), None) if cut is None else (cut.shape(info.shape), cut.apply)
            if name in adapter.factors:
                transform = partial(_merged_and_cut, checkpoint, name, adapter, cut)
            written.append(Written(name, name, shape, transform))
    stored = checkpoint.names if kept is None or is_plain(checkpoint, kept.shape) else SAME
    stream_weight_file(checkpoint, file, written, target, stored)


def _merged_and_cut(checkpoint: Checkpoint, name: str, adapter: Adapter, cut: Cut | None, weight: Tensor) -> Tensor:
    """What stays of a merged weight, rounded once, to the dtype that the weight has."""
    whole = merged(adapter.scale, *adapter.factors[name], weight)
    staying = whole if cut is None else cut.apply(whole)
    rounded = as_stored(checkpoint, name, staying, otherwise="lower the training's learning_rate")
    if not rounded.isfinite().all():  # the loss of the last step, which was finite, is of the weights before it
        raise UserError(
            f"{checkpoint.path}: the new {name} is NaN or infinite after the training's last step; lower the "
            "training's learning_rate or weight_decay"
        )
    return rounded


def merged(scale: float, factor_a: Tensor, factor_b: Tensor, weight: Tensor) -> Tensor:
    """W + scale * B @ A in float32."""
    return weight.float() + scale * (factor_b.float() @ factor_a.float())

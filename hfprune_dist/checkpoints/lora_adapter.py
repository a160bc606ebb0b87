"""LoRA adapters on disk, in peft's format, and merging them into a checkpoint without holding the model in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import Family
from hfprune_dist.checkpoints.read_tensors import as_stored, read_tensor
from hfprune_dist.checkpoints.write_pruned import Cut, staying
from hfprune_dist.errors import UserError, naming
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.low_rank import linear_modules

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

PEFT_PREFIX = "base_model.model."  # of names in a ``PeftModel``
PEFT_NAME = "default"  # of the only adapter
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """Low-rank updates of weights: W + scale * B @ A; ``factors`` are, by W's name, A [r, in] and B [out, r]."""

    scale: float
    factors: Mapping[str, tuple[Tensor, Tensor]]


def lora_targets(family: Family, low_rank: Container[str] = ()) -> list[str] | str:
    """Names within a layer of the linear layers that get an adapter: all of attention and of MLPs, and both factors of
    those of low rank; or, where other parts of the model may use the same names, a pattern that matches only the
    decoder's. In mixtures of experts, only attention gets adapters: peft would take the names of MLP projections for
    the experts', whose adapters can't be merged matrix by matrix.
    """
    names = [linear for name in family.adapted_attention for linear in linear_modules(name, low_rank)]
    rows, down, _ = family.projections
    names += [] if family.experts else [".".join(filter(None, (family.mlp, name))) for name in (*rows, down)]
    return rf"{re.escape(family.layers)}\.\d+\.({'|'.join(map(re.escape, names))})" if family.has_vision else names


def write_adapter(
    folder: Path, parameters: Mapping[str, Tensor], targets: Sequence[str] | str, rank: int, alpha: int
) -> None:
    """Write an adapter for peft: ``parameters`` named as in a ``PeftModel``, and ``targets`` from ``lora_targets``."""
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
        f"{module.removeprefix(PEFT_PREFIX)}.weight": (tensors[module + _A], tensors[module + _B]) for module in modules
    }
    return Adapter(config["lora_alpha"] / config["r"], factors)


def merged(checkpoint: Checkpoint, adapter: Adapter, kept: Kept) -> dict[str, Callable[[], Tensor]]:
    """Name of each adapted weight -> what merges the adapter into it and cuts it to the units ``kept``; dtypes stay."""
    assert adapter.factors.keys() <= checkpoint.tensors.keys(), "the adapter has weights that the checkpoint lacks"
    cuts = {name: cut for name, (_, cut) in staying(checkpoint, kept).items() if name in adapter.factors}
    return {name: partial(_merged_and_cut, checkpoint, name, adapter, cut) for name, cut in cuts.items()}


def _merged_and_cut(checkpoint: Checkpoint, name: str, adapter: Adapter, cut: Cut) -> Tensor:
    """What stays of a merged weight, rounded once, to the dtype that the weight has."""
    factor_a, factor_b = adapter.factors[name]
    whole = read_tensor(checkpoint, name).float() + adapter.scale * (factor_b.float() @ factor_a.float())
    return rounded(checkpoint, name, cut.apply(whole))


def rounded(checkpoint: Checkpoint, name: str, trained: Tensor) -> Tensor:
    """A weight after training in the dtype that it has in the files; refused if it is not finite, or too large."""
    stored = as_stored(checkpoint, name, trained, otherwise="lower the training's learning_rate")
    if not stored.isfinite().all():  # the loss of the last step, which was finite, is of the weights before it
        raise UserError(
            f"{checkpoint.path}: the new {name} is NaN or infinite after the training's last step; lower the "
            "training's learning_rate or weight_decay"
        )
    return stored

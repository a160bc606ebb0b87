"""The tensors of a model's modules, and the tensors in a checkpoint's files that each is made from; without torch.

Files and modules mostly have the same tensors under the same names. But modules hold all experts of a layer in one
tensor, while some files have one tensor per expert; and some blocks have other names in files.
"""

from __future__ import annotations

from dataclasses import dataclass

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.structures.experts import Experts

# Convolutions of linear attention, which some files have as separate tensors.
_JOINED, _WHOLE = (".q_conv1d.weight", ".k_conv1d.weight", ".v_conv1d.weight"), ".conv1d.weight"


@dataclass(frozen=True)
class ModuleTensor:
    """A tensor of a module.

    Attributes:
        sources: names in the files of the tensors that it is made from: for each expert, the matrices to concatenate; a
            single name if the files have the tensor as it is.
        is_stacked: whether the experts' matrices are stacked, along a new first dimension.
    """

    shape: tuple[int, ...]
    sources: tuple[tuple[str, ...], ...]
    is_stacked: bool = False


def module_tensors(checkpoint: Checkpoint, layer: int | None = None) -> dict[str, ModuleTensor]:
    """Name in modules -> tensor, for the whole model, or only for one layer if it is given."""
    return _joined(_of_checkpoint(checkpoint, layer))


def _joined(tensors: dict[str, ModuleTensor]) -> dict[str, ModuleTensor]:
    """The same tensors, with those joined that modules have as one."""
    made = dict(tensors)
    for first in (name for name in tensors if name.endswith(_JOINED[0])):
        names = [first.removesuffix(_JOINED[0]) + part for part in _JOINED]
        parts = [made.pop(name) for name in names]
        shape = (sum(it.shape[0] for it in parts), *parts[0].shape[1:])
        made[first.removesuffix(_JOINED[0]) + _WHOLE] = ModuleTensor(shape, (tuple(it.sources[0][0] for it in parts),))
    return made


def _of_checkpoint(checkpoint: Checkpoint, layer: int | None) -> dict[str, ModuleTensor]:
    prefix = f"{checkpoint.family.layers}."
    wanted = prefix if layer is None else f"{prefix}{layer}."
    names = [name for name in checkpoint.tensors if layer is None or name.startswith(wanted)]
    experts = checkpoint.family.experts
    if experts is None:
        return {name: ModuleTensor(checkpoint.tensors[name].shape, ((name,),)) for name in names}
    found: dict[str, ModuleTensor] = {}
    owned = {it.tensor for it in (*experts.rows, *experts.columns)} if experts.each else set()
    for name in names:
        number, _, part = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or part not in owned:
            renamed = f"{prefix}{number}.{experts.in_modules(part)}" if name.startswith(prefix) else name
            found[renamed] = ModuleTensor(checkpoint.tensors[name].shape, ((name,),))
    if experts.each:
        for sparse in experts.layers if layer is None else {layer} & {*experts.layers}:
            found |= _of_experts(checkpoint, experts, f"{prefix}{sparse}")
    return found


def _of_experts(checkpoint: Checkpoint, experts: Experts, layer: str) -> dict[str, ModuleTensor]:
    """The stacked tensors of a layer whose experts have tensors of their own in the files."""
    stacked = {}
    for module, owned in (("gate_up_proj", experts.rows), ("down_proj", experts.columns)):
        sources = tuple(
            tuple(f"{layer}.{it.tensor}" for it in owned if it.expert == expert) for expert in range(experts.count)
        )
        rows, columns = checkpoint.tensors[sources[0][0]].shape
        shape = (experts.count, rows * len(sources[0]), columns)
        stacked[f"{layer}.{experts.module}.{module}"] = ModuleTensor(shape, sources, is_stacked=True)
    return stacked

"""The state of a training, from which any number of ranks can resume.

<name>.safetensors                   the masks; step, losses, and names and shapes of what is trained
<name>-<step>-<number>.safetensors   a share of all of it as one vector, and of AdamW's two moments, float32

loss.jsonl                           the losses, to be looked at while it runs

Shares are written first, so the first file has those of its step. Rows, learning rate and dropout follow from the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import is_usable, load_tensors, save_tensors
from hfprune_dist.distributed.world import World
from hfprune_dist.kinds.training import LOSSES
from hfprune_dist.store.atomic_files import write_jsonl

WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")

LossLine = dict[str, float | int]


@dataclass(frozen=True)
class Snapshot:
    """The state after optimizer step ``step``.

    Attributes:
        tensors: ``UnitMasks.state``.
        losses: one line per step so far.
        shapes: name of each parameter that is trained -> its shape, in the vector's order. LoRA's have the names that
            they have in a ``PeftModel``.
        shares: the files with the vector's parts, in order.
        notes: for the manifest: rows per forward pass of one rank (``micro_batch_size``), which later attempts keep,
            whether Liger's kernels computed (``fused_kernels``), and the ``seconds`` of training in all attempts.
    """

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: list[LossLine] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    shares: list[Path] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def vector(self, name: str, part: slice) -> Tensor:
        """A part of the vector (``WEIGHTS``) or of a moment, float32 on the CPU."""
        found, begin = [torch.empty(0)], 0
        for file in self.shares:
            with safe_open(file, framework="pt") as stream:
                of_file = stream.get_slice(name)
                end = begin + of_file.get_shape()[0]
                if begin < part.stop and part.start < end:
                    found.append(of_file[max(part.start - begin, 0) : min(part.stop, end) - begin])
                begin = end
        return torch.cat(found)

    def weight(self, name: str) -> Tensor:
        """A parameter, float32 on the CPU."""
        begin = 0
        for other, shape in self.shapes.items():
            if other == name:
                return self.vector(WEIGHTS, slice(begin, begin + prod(shape))).view(shape)
            begin += prod(shape)
        raise KeyError(name)

    @property
    def weights(self) -> dict[str, Tensor]:
        """All parameters; LoRA's are few."""
        return {name: self.weight(name) for name in self.shapes}

    def save(self, file: Path, state: Mapping[str, Tensor] | None, world: World) -> None:
        """Replace an earlier snapshot by this one; collective.

        Args:
            state: this rank's share of the vector and of its moments; None if it has none.
        """
        if state is not None:
            save_tensors(state, _share_file(file, self.step, world.rank))
        shares = sum(world.all_gather(state is not None))

        def write() -> None:
            told = {name: getattr(self, name) for name in ("step", "losses", "shapes", "notes")} | {"shares": shares}
            texts = {name: json.dumps(value, allow_nan=False) for name, value in told.items()}
            save_tensors(self.tensors, file, texts)
            write_jsonl(file.with_name(LOSSES), self.losses)
            kept = [_share_file(file, self.step, number) for number in range(shares)]
            for other in {*file.parent.glob(f"{file.stem}-*-*.safetensors")}.difference(kept):
                other.unlink()

        world.on_rank0(write)

    @classmethod
    def read(cls, file: Path) -> Snapshot:
        tensors, texts = load_tensors(file)
        told = {name: json.loads(text) for name, text in texts.items()}
        shares = [_share_file(file, told["step"], number) for number in range(told.pop("shares"))]
        return cls(tensors=tensors, shares=shares, **told)

    @classmethod
    def last(cls, file: Path, world: World) -> Snapshot:
        """The newest snapshot that an earlier attempt left intact; the beginning if there is none. Collective."""
        if not world.on_rank0(lambda: is_usable(file)):
            return cls()
        found = cls.read(file)
        mine = found.shares[world.rank :: world.size]
        return found if all(world.all_gather(all(map(is_usable, mine)))) else cls()


def _share_file(file: Path, step: int, number: int) -> Path:
    return file.with_name(f"{file.stem}-{step}-{number}.safetensors")

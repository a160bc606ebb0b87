"""The state of LoRA training between two optimizer steps, as files from which any number of ranks can resume."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import is_usable, load_tensors, save_tensors
from hfprune_dist.training.loraprune import PREFIX

KEPT_SNAPSHOTS = 2
MOMENTS = ("exp_avg", "exp_avg_sq")

LossLine = dict[str, float | int]


@dataclass(frozen=True)
class Snapshot:
    """The state of training after optimizer step ``step``.

    Attributes:
        weights: LoRA parameters, whole, float32, under the names that they have in a ``PeftModel``.
        moments: AdamW's ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``, float32.
        losses: one line per step so far.
        units: averaged scores of units that are masked during training, and which stay (``UnitMasks.state``).
    """

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    losses: list[LossLine]
    units: dict[str, Tensor] = field(default_factory=dict)

    def metrics(self) -> dict[str, float | int]:
        """Metrics, for a manifest, of the training that ended here."""
        return {"steps": len(self.losses), "first_loss": self.losses[0]["loss"], "final_loss": self.losses[-1]["loss"]}


class Snapshots:
    """The newest snapshots in a folder, one file each; a file with a snapshot's name is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot, then delete all but the newest two."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step-{snapshot.step:08d}.safetensors"
        texts = {"step": str(snapshot.step), "losses": json.dumps(snapshot.losses, allow_nan=False)}
        save_tensors({**snapshot.weights, **snapshot.moments, **snapshot.units}, file, texts)
        for outdated in self._files()[KEPT_SNAPSHOTS:]:
            outdated.unlink()

    def newest(self) -> Path | None:
        """The newest snapshot whose file is undamaged; None if there is none. Damaged ones are set aside."""
        return next((file for file in self._files() if is_usable(file)), None)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)


def read_snapshot(file: Path) -> Snapshot:
    """Read a snapshot's file."""
    tensors, texts = load_tensors(file)
    moments = {name: tensor for name, tensor in tensors.items() if name.endswith(MOMENTS)}
    units = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    weights = {name: tensor for name, tensor in tensors.items() if name not in moments and name not in units}
    return Snapshot(int(texts["step"]), weights, moments, json.loads(texts["losses"]), units)

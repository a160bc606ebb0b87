"""Refit of a pruned model's MLPs, one layer after another, on the activations of calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hfprune_dist.core.reconstruction import Biases, MlpWeights
from hfprune_dist.core.refit import best_ridge, output_error, refit_down_projection
from hfprune_dist.files import read_json, write_json
from hfprune_dist.models.checkpoint import Checkpoint
from hfprune_dist.models.layers import mlp_of, narrow
from hfprune_dist.parallel.layerwise import Grams, LayerStream
from hfprune_dist.parallel.reconstruct import Reconstruction
from hfprune_dist.parallel.world import World


@dataclass(frozen=True)
class LayerFit:
    """What a refit did to one layer's down projection.

    Attributes:
        ridge: chosen on held-out windows.
        error_before: share of the MLP output's energy that pruning alone loses.
        error_after: the share that is still lost after least squares.
    """

    ridge: float
    error_before: float
    error_after: float


class Refit:
    """Refits layer after layer; what is done is found in ``folder`` by a later attempt.

    Args:
        kept: of each layer, ascending indices of the neurons that stay.
        inputs: "dense": activations of the dense model. "layerwise": of the model pruned and refitted so far. "block":
            the same, and after least squares on the down projection a step of Gauss-Newton on all three projections.
        folder: gets two files per layer, written by one rank and read by all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Sequence[Tensor],
        inputs: Literal["dense", "layerwise", "block"],
        stream: LayerStream,
        folder: Path,
        world: World,
    ) -> None:
        self._checkpoint = checkpoint
        self._family = checkpoint.family
        self._kept = kept
        self._inputs = inputs
        self._stream = stream
        self._folder = folder
        self._world = world
        self._waiting: tuple[Callable[[], tuple[LayerFit, Tensor]], int] | None = None

    def run(self, after_each: Callable[[int], None]) -> list[LayerFit]:
        """Refit all layers.

        Args:
            after_each: called on every rank with the number of layers that are done.
        """
        if self._world.is_first:
            self._folder.mkdir(exist_ok=True)
        done = self._world.broadcast(self._count_done())
        for number in range(self._checkpoint.num_layers):
            layer = self._stream.layer(number)
            if self._inputs == "dense":
                if number >= done:
                    self._fit_later(number, layer)
                else:
                    self._stream.advance(layer)
            else:
                if number >= done:
                    self._fit(number, layer, self._stream.grams(number, layer, advance=False))
                self._install(number, mlp_of(layer))
                self._stream.advance(layer)
            after_each(number + 1)
        return [LayerFit(**read_json(self._report_file(number))) for number in range(self._checkpoint.num_layers)]

    def replacements(self) -> dict[str, Callable[[], Tensor]]:
        """Name of every refitted tensor -> reads it."""
        return {
            name: partial(self._read, number, name)
            for number in range(self._checkpoint.num_layers)
            for name in self._fitted_names(number)
        }

    def _fit_later(self, number: int, layer: nn.Module) -> None:
        """Layers of dense activations don't wait for each other: every rank solves one, all at the same time."""
        grams = self._stream.grams(number, layer, advance=True)
        if number % self._world.size == self._world.rank:
            weight_CD = self._linear(mlp_of(layer), self._family.down_projection).weight.data.double()
            self._waiting = partial(_solve, weight_CD, grams, self._kept[number].to(weight_CD.device)), number
        if (number + 1) % self._world.size == 0 or number + 1 == self._checkpoint.num_layers:
            if self._waiting is not None:
                solve, mine = self._waiting
                fit, down_CK = solve()
                self._write(mine, [down_CK], fit)
                self._waiting = None
            self._world.barrier()

    def _fit(self, number: int, layer: nn.Module, grams: Grams) -> None:
        """Solve on rank 0, and where all of the MLP moves, go on from there with all ranks."""
        mlp = mlp_of(layer)
        kept = self._kept[number].to(grams.whole_DD.device)
        weight_CD = self._linear(mlp, self._family.down_projection).weight.data.double()
        fit, down_CK = self._world.broadcast(_solve(weight_CD, grams, kept) if self._world.is_first else _nothing())
        tensors = [down_CK]
        if self._inputs == "block":
            tensors = list(self._reconstructed(mlp, layer, kept, down_CK).tensors())
        if self._world.is_first:
            self._write(number, tensors, fit)
        self._world.barrier()

    def _write(self, number: int, tensors: Sequence[Tensor], fit: LayerFit) -> None:
        """Write a layer's weights, then its report, whose presence says that the layer is done."""
        fitted = zip(self._fitted_names(number), tensors, strict=True)
        draft = self._weight_file(number).with_suffix(".draft")
        save_file({name: tensor.to(self._dtype(name)).cpu().contiguous() for name, tensor in fitted}, draft)
        draft.replace(self._weight_file(number))
        write_json(self._report_file(number), asdict(fit))

    def _reconstructed(self, mlp: nn.Module, layer: nn.Module, kept: Tensor, down_CK: Tensor) -> MlpWeights:
        """Gate, up and down of the kept neurons after a step towards the dense MLP."""
        gate, up = (self._linear(mlp, name) for name in self._family.row_projections)
        down = self._linear(mlp, self._family.down_projection)
        dense = MlpWeights(*(linear.weight.data.float() for linear in (gate, up, down)))
        biases = [None if linear.bias is None else linear.bias.data for linear in (gate, up)]
        reconstruction = Reconstruction(
            dense, Biases(*biases), self._stream.mlp_inputs(layer), self._stream.micro_batches, self._world
        )
        start = MlpWeights(dense.gate_KC[kept], dense.up_KC[kept], down_CK.to(dense.down_CK))
        return reconstruction.improve(start, Biases(*(None if bias is None else bias[kept] for bias in biases)))

    def _install(self, number: int, mlp: nn.Module) -> None:
        """Turn a dense layer's MLP into the pruned and refitted one."""
        prefix = f"{self._family.mlp_prefix(number)}."
        narrow(mlp, self._family, self._kept[number])
        for name in self._fitted_names(number):
            weight = self._linear(mlp, name.removeprefix(prefix).removesuffix(".weight")).weight
            weight.data = self._read(number, name).to(weight)

    def _count_done(self) -> int:
        done = 0
        while done < self._checkpoint.num_layers and self._report_file(done).is_file():
            done += 1
        return done

    def _fitted_names(self, number: int) -> list[str]:
        """Tensors of a layer that the refit changes, in the order of ``MlpWeights`` where there are three."""
        prefix = self._family.mlp_prefix(number)
        rows = [f"{prefix}.{name}.weight" for name in self._family.row_projections] if self._inputs == "block" else []
        return [*rows, self._family.column_tensor(number)]

    def _linear(self, mlp: nn.Module, name: str) -> nn.Linear:
        return cast("nn.Linear", mlp.get_submodule(name))

    def _read(self, number: int, name: str) -> Tensor:
        with safe_open(self._weight_file(number), framework="pt") as source:
            tensor: Tensor = source.get_tensor(name)
        return tensor

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the checkpoint's files."""
        names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return names[self._checkpoint.tensors[name].dtype]

    def _weight_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"

    def _report_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.json"


def _solve(weight_CD: Tensor, grams: Grams, kept: Tensor) -> tuple[LayerFit, Tensor]:
    """Least squares on the down projection, with the ridge that held-out windows choose."""
    ridge = best_ridge(weight_CD, grams.fitted_DD, grams.held_out_DD, kept)
    new_weight = refit_down_projection(weight_CD, grams.whole_DD, kept, ridge)
    fit = LayerFit(
        ridge,
        output_error(weight_CD, grams.whole_DD, kept, weight_CD[:, kept]),
        output_error(weight_CD, grams.whole_DD, kept, new_weight),
    )
    return fit, new_weight.float().cpu()


def _nothing() -> tuple[LayerFit, Tensor]:
    return LayerFit(0.0, 0.0, 0.0), torch.zeros(0)

"""Refit of a pruned model's down projections, one layer after another, on the activations of calibration windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfprune_dist.core.refit import best_ridge, output_error, refit_down_projection
from hfprune_dist.files import read_json, write_json
from hfprune_dist.models.checkpoint import Checkpoint
from hfprune_dist.models.layers import mlp_of
from hfprune_dist.parallel.layerwise import Grams, LayerStream
from hfprune_dist.parallel.world import World

WEIGHT = "weight"


@dataclass(frozen=True)
class LayerFit:
    """What a refit did to one layer.

    Attributes:
        ridge: chosen on held-out windows.
        error_before: share of the MLP output's energy that pruning alone loses.
        error_after: the share that is still lost with the refitted weight.
    """

    ridge: float
    error_before: float
    error_after: float


class Refit:
    """Refits layer after layer; what is done is found in ``folder`` by a later attempt.

    Args:
        kept: of each layer, ascending indices of the neurons that stay.
        inputs: "dense": activations of the dense model. "layerwise": of the model pruned and refitted so far.
        folder: gets one file per layer, written by rank 0 and read by all.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Sequence[Tensor],
        inputs: Literal["dense", "layerwise"],
        stream: LayerStream,
        folder: Path,
        world: World,
    ) -> None:
        self._checkpoint = checkpoint
        self._kept = kept
        self._inputs = inputs
        self._stream = stream
        self._folder = folder
        self._world = world

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
            if number >= done:
                grams = self._stream.grams(number, layer, advance=self._inputs == "dense")
                self._fit(number, mlp_of(layer), grams)
                del grams
            if self._inputs == "layerwise":
                self._install(number, mlp_of(layer))
                self._stream.advance(layer)
            elif number < done:
                self._stream.advance(layer)
            after_each(number + 1)
        return [LayerFit(**read_json(self._report_file(number))) for number in range(self._checkpoint.num_layers)]

    def replacements(self) -> dict[str, Callable[[], Tensor]]:
        """Name of every refitted tensor -> reads it."""
        return {self._column(number): partial(self._weight, number) for number in range(self._checkpoint.num_layers)}

    def _fit(self, number: int, mlp: nn.Module, grams: Grams) -> None:
        """On rank 0: solve, and write weight and report; the report's presence says that the layer is done."""
        if self._world.is_first:
            weight_CD = _linear(mlp, self._checkpoint.family.down_projection).weight.data.double()
            kept = self._kept[number].to(weight_CD.device)
            ridge = best_ridge(weight_CD, grams.fitted_DD, grams.held_out_DD, kept)
            new_weight = refit_down_projection(weight_CD, grams.whole_DD, kept, ridge)
            fit = LayerFit(
                ridge,
                output_error(weight_CD, grams.whole_DD, kept, weight_CD[:, kept]),
                output_error(weight_CD, grams.whole_DD, kept, new_weight),
            )
            dtype = getattr(torch, _torch_name(self._checkpoint.tensors[self._column(number)].dtype))
            draft = self._weight_file(number).with_suffix(".draft")
            save_file({WEIGHT: new_weight.to(dtype).cpu().contiguous()}, draft)
            draft.replace(self._weight_file(number))
            write_json(self._report_file(number), asdict(fit))
        self._world.barrier()

    def _install(self, number: int, mlp: nn.Module) -> None:
        """Turn a dense layer's MLP into the pruned and refitted one."""
        family = self._checkpoint.family
        for name in family.row_projections:
            row = _linear(mlp, name)
            kept = self._kept[number].to(row.weight.device)
            row.weight = nn.Parameter(row.weight.data[kept], requires_grad=False)
            if row.bias is not None:
                row.bias = nn.Parameter(row.bias.data[kept], requires_grad=False)
        column = _linear(mlp, family.down_projection)
        column.weight = nn.Parameter(self._weight(number).to(column.weight), requires_grad=False)

    def _count_done(self) -> int:
        done = 0
        while done < self._checkpoint.num_layers and self._report_file(done).is_file():
            done += 1
        return done

    def _column(self, number: int) -> str:
        return self._checkpoint.family.column_tensor(number)

    def _weight(self, number: int) -> Tensor:
        weight: Tensor = load_file(self._weight_file(number))[WEIGHT]
        return weight

    def _weight_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"

    def _report_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.json"


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    return cast("nn.Linear", mlp.get_submodule(name))


def _torch_name(file_dtype: str) -> str:
    """The safetensors format's name of a dtype -> torch's."""
    return {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[file_dtype]

"""Divergences of candidates whose outputs are not numbers."""

import pytest
import torch
from ranks import SoloWorld
from refitting import checkpoint_in, windows_of
from safetensors.torch import load_file, save_file

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LAYER
from hfprune_dist.refit.measurement import Measurement, dense_outputs, one_by_one


class OneIsStrange:
    """``Variants`` in which one has NaN weights."""

    def weights(self, _number, layer, choices):
        name = "mlp.down_proj.weight"
        weight = layer.get_parameter(f"{LAYER}.{name}")
        return {choice: {name: weight * float("nan")} if choice == (2,) else {} for choice in choices}

    def go_past(self, layer):
        pass


class AsItIs:
    """``Variants`` without any."""

    def weights(self, _number, _layer, choices):
        return {choice: {} for choice in choices}

    def go_past(self, layer):
        pass


def test_a_shape_whose_outputs_are_nan_is_one_message(tmp_path):
    checkpoint, batches = checkpoint_in(tmp_path / "model", layers=2), one_by_one(windows_of(2))
    dense = dense_outputs(checkpoint, batches, torch.bfloat16, SoloWorld(), lambda _done: None)
    measurement = Measurement(
        checkpoint,
        OneIsStrange,
        batches,
        reference=lambda: dense,
        dtype=torch.bfloat16,
        world=SoloWorld(),
        folder=tmp_path / "work",
        after_each=lambda _done: None,
    )
    with pytest.raises(UserError, match=r"1 of 2 shapes .* NaN or infinite in torch.bfloat16; .*dtype=float32"):
        measurement.kl([((1,), (1,)), ((1,), (2,))])


def test_a_model_is_compared_with_the_dense_ones_norm_and_not_with_its_own(tmp_path):
    """In rounds, an earlier one may have refitted the final norm."""
    batches, kls = one_by_one(windows_of(2)), {}
    dense = dense_outputs(checkpoint_in(tmp_path / "1"), batches, torch.float32, SoloWorld(), lambda _done: None)
    for scale in (1, 3):
        checkpoint = checkpoint_in(tmp_path / str(scale))
        file = checkpoint.path / "model.safetensors"
        tensors = load_file(file)
        tensors["model.norm.weight"] *= scale
        save_file(tensors, file)
        measurement = Measurement(
            open_checkpoint(checkpoint.path),
            AsItIs,
            batches,
            reference=lambda: dense,
            dtype=torch.float32,
            world=SoloWorld(),
            folder=tmp_path / f"work {scale}",
            after_each=lambda _done: None,
        )
        (kls[scale],) = measurement.kl([((0,),) * checkpoint.num_layers])
    assert kls[1] == pytest.approx(0, abs=1e-5) and kls[3] > 1e-3

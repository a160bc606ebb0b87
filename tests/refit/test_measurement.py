"""Divergences of candidates whose outputs are not numbers."""

import pytest
import torch
from ranks import SoloWorld
from refitting import checkpoint_in, windows_of

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

"""Rounding to a checkpoint's dtypes: what float16 can't hold is told, and nothing else."""

import pytest
import torch
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.rounding import as_stored
from hfprune_dist.errors import UserError

NAME = "model.layers.1.mlp.down_proj.weight"
# The smallest float32 that float16 rounds to infinity.
TOO_LARGE = 65520.0


def checkpoint_of(folder, dtype):
    return open_checkpoint(save_tiny(folder, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_tensor_the_checkpoint_and_what_to_do_are_told(tmp_path, dtype, sign):
    checkpoint = checkpoint_of(tmp_path / "half", torch.float16)
    computed = torch.tensor([[1.0, sign * TOO_LARGE], [float("inf"), float("nan")]], dtype=dtype)
    with pytest.raises(UserError) as told:
        as_stored(checkpoint, NAME, computed, otherwise="do without")
    assert str(told.value).startswith(f"{tmp_path / 'half'}: the new {NAME} has values up to 65,520, but float16, ")
    assert "ends at 65,504; convert the dense model to bfloat16" in str(told.value)
    assert str(told.value).endswith(", or do without")


def test_a_new_tensor_has_the_dtype_of_another(tmp_path):
    checkpoint, bias = checkpoint_of(tmp_path / "half", torch.float16), NAME.replace("weight", "bias")
    assert as_stored(checkpoint, bias, torch.ones(3), like=NAME, otherwise="").dtype == torch.float16
    with pytest.raises(UserError, match=bias):
        as_stored(checkpoint, bias, torch.full((3,), TOO_LARGE), like=NAME, otherwise="")


def test_what_is_infinite_before_rounding_and_what_fits_is_just_rounded(tmp_path):
    checkpoint = checkpoint_of(tmp_path / "half", torch.float16)
    for value in (float("inf"), -float("inf"), float("nan"), 65519.0, -65504.0, 0.1):
        for dtype in (torch.float16, torch.float32, torch.float64):
            computed = torch.tensor([value], dtype=dtype)
            found = as_stored(checkpoint, NAME, computed, otherwise="")
            torch.testing.assert_close(found, computed.half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_hold_it(tmp_path, dtype):
    computed = torch.tensor([TOO_LARGE, 1e30], dtype=torch.float64)
    found = as_stored(checkpoint_of(tmp_path / "model", dtype), NAME, computed, otherwise="")
    assert torch.equal(found, computed.to(dtype)) and found.isfinite().all()

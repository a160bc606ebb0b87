"""Refits tell if new weights are too large for a checkpoint in float16, instead of writing infinities."""

import pytest
import torch
from refitting import checkpoint_in, refit, some_kept, windows_of
from safetensors.torch import load_file, save_file
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError

LAYERS = (0, 2)
WINDOWS = windows_of(8)
LARGEST = torch.finfo(torch.float16).max
DOWN, OUTPUT = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"


def at_the_end(folder, name):
    """A checkpoint in float16 in which all values of a tensor lie at the ends of its range."""
    checkpoint = checkpoint_in(folder, dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.full_like(tensors[name], LARGEST).copysign(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(checkpoint.path)


def told_by(work):
    """What the first of two ranks to fail says."""
    with pytest.raises(UserError) as error:
        Ranks(2).run(work)
    return str(error.value)


@pytest.mark.parametrize(("method", "name"), [("dense", OUTPUT), ("layerwise", DOWN), ("block", OUTPUT)])
def test_refits_tell_it(tmp_path, method, name):
    checkpoint = at_the_end(tmp_path / "model", name)
    message = told_by(
        lambda world: refit(method, checkpoint, some_kept(LAYERS), tmp_path / "refit", world=world, windows_ST=WINDOWS)
    )
    assert message.startswith(f"{tmp_path / 'model'}: the new {name} has values up to ")
    assert message.endswith(", or choose a method with another refit")
    assert not (tmp_path / "refit/layer-0.safetensors").exists()

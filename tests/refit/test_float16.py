"""Every kind of refit tells if new weights are too large for a checkpoint in float16, instead of writing infinities."""

import pytest
import torch
from refitting import checkpoint_in, refit, some_kept, windows_of
from safetensors.torch import load_file, save_file
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.errors import UserError
from hfprune_dist.refit.bias_refit import find_biases
from hfprune_dist.refit.low_rank import compress_layers
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Shape

LAYERS = (0, 2)
WINDOWS = windows_of(8)
LARGEST = torch.finfo(torch.float16).max
DOWN, OUTPUT = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"


def at_the_end(folder, *names, tiny=()):
    """A checkpoint in float16 in which all values of some tensors lie at the ends of its range, and others near 0."""
    checkpoint = checkpoint_in(folder, dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in (*names, *tiny):
        tensors[name] = torch.full_like(tensors[name], 1e-7 if name in tiny else LARGEST).copysign(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(checkpoint.path)


def told_by(work):
    """What the first of two ranks to fail says."""
    with pytest.raises(UserError) as error:
        Ranks(2).run(work)
    return str(error.value)


def nothing(_done):
    pass


@pytest.mark.parametrize(("method", "name"), [("dense", OUTPUT), ("layerwise", DOWN), ("block", OUTPUT)])
def test_refits_tell_it(tmp_path, method, name):
    checkpoint = at_the_end(tmp_path / "model", name)
    message = told_by(
        lambda world: refit(method, checkpoint, some_kept(LAYERS), tmp_path / "refit", world=world, windows_ST=WINDOWS)
    )
    assert message.startswith(f"{tmp_path / 'model'}: the new {name} has values up to ")
    assert message.endswith(", or choose a method with another refit")
    assert not (tmp_path / "refit/layer-0.safetensors").exists()


def test_biases_tell_it(tmp_path):
    checkpoint = at_the_end(tmp_path / "model", DOWN, DOWN.replace("down", "up"))
    kept, kinds = some_kept(LAYERS), [checkpoint.structures[kind] for kind in ("neurons", "kv_groups")]

    def work(world):
        stream = LayerStream(checkpoint, WINDOWS, torch.float32, 2, world)
        find_biases(kept, kinds, stream, RefittedLayers(checkpoint, tmp_path / "biases"), nothing)

    message = told_by(work)
    assert message.startswith(f"{tmp_path / 'model'}: the new {DOWN.replace('weight', 'bias')} has values up to ")
    assert not list(tmp_path.glob("biases/*"))


def test_factors_of_low_rank_tell_it(tmp_path):
    """Where a projection reads next to nothing, its right factor is all the larger."""
    checkpoint = at_the_end(tmp_path / "model", OUTPUT, tiny=[OUTPUT.replace("o_proj", "v_proj")])

    def work(world):
        stream = LayerStream(checkpoint, WINDOWS, torch.float32, 2, world)
        shape = Shape((0, 1, 2), {"neurons": (12,) * 3}, {f"self_attn.{name}_proj": (4,) * 3 for name in "qo"})
        compress_layers(checkpoint, shape, stream, RefittedLayers(checkpoint, tmp_path / "layers"), nothing)

    message = told_by(work)
    assert message.startswith(f"{tmp_path / 'model'}: the new model.layers.0.self_attn.o_proj.")
    assert message.endswith(", or choose a method with another refit")
    assert not list(tmp_path.glob("layers/*"))

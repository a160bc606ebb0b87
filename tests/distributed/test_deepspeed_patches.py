"""Loading sharded models leaves nothing behind in a process that changes later results."""

import torch
from forks import on_ranks
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.distributed.deepspeed_patches import torchs_linear_afterwards
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.zero3 import load_frozen

LINEAR = torch.nn.functional.linear
# Large enough for DeepSpeed to shard the MLPs' weights.
SHARDED = {"hidden_size": 256, "intermediate_size": 416}


def test_a_sharded_model_with_biases_has_the_bits_of_a_whole_one_before_and_after(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path, "qwen2", dtype=torch.bfloat16, **SHARDED))
    window_T = torch.arange(3, 24)

    def compare(world):
        def hidden(sharding):
            return FrozenModel(checkpoint, torch.bfloat16, 1, sharding, world).final_hidden(window_T)

        whole_TC = hidden("replicate")
        assert torch.equal(hidden("zero3"), whole_TC)
        assert torch.equal(hidden("replicate"), whole_TC)

    assert on_ranks(2, compare).codes == [0, 0]


def test_loading_frozen_models_leaves_torchs_linear_alone(tmp_path):
    folder = save_tiny(tmp_path)

    def load(world):
        load_frozen(folder, torch.float32, 1, world)
        assert torch.nn.functional.linear is LINEAR

    assert on_ranks(1, load).codes == [0]


def test_after_training_linear_is_torchs_again_however_it_ended():
    class Stopped(BaseException):
        pass

    try:
        with torchs_linear_afterwards():
            torch.nn.functional.linear = None
            raise Stopped
    except Stopped:
        assert torch.nn.functional.linear is LINEAR

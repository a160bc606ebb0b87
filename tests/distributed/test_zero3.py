"""Sharded models compute what whole ones do."""

import torch
import torch.distributed as dist
from gather_counter import counting_gathers
from ranks import on_ranks
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.distributed.frozen_model import FrozenModel

# Large enough for DeepSpeed to shard the MLPs' weights.
SHARDED = {"hidden_size": 256, "intermediate_size": 416}


def test_a_sharded_model_with_biases_has_the_bits_of_a_whole_one_before_and_after(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path, "qwen2", dtype=torch.bfloat16, **SHARDED))
    window_T = torch.arange(3, 24)

    def compare(world):
        def hidden(sharding):
            return FrozenModel(checkpoint, torch.bfloat16, sharding, world).final_hidden(window_T)

        whole_TC = hidden("replicate")
        assert torch.equal(hidden("zero3"), whole_TC)
        assert torch.equal(hidden("replicate"), whole_TC)

    assert on_ranks(2, compare) == [0, 0]


def test_layers_are_gathered_ahead_once_their_order_is_known(tmp_path):
    """Also where only the body runs, as for fidelity."""
    checkpoint = open_checkpoint(save_tiny(tmp_path, "qwen2", dtype=torch.bfloat16, **SHARDED))

    def count(world):
        model, gathered = FrozenModel(checkpoint, torch.bfloat16, "zero3", world), []
        with counting_gathers() as counts:
            first = model.module.model.layers[0]
            first.register_forward_hook(lambda *_: gathered.append(counts.bytes))
            for _ in range(4):
                counts.bytes = 0
                model.final_hidden(torch.arange(3, 24))
        assert gathered[0] < gathered[-1], gathered

    assert on_ranks(2, count) == [0, 0]


def test_gathers_wait_as_long_as_all_else_for_rank_0_at_work_alone(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path, "qwen2", dtype=torch.bfloat16, **SHARDED))

    def compare(world):
        FrozenModel(checkpoint, torch.bfloat16, "zero3", world)
        groups = dist.distributed_c10d._world.pg_map
        timeouts = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
        assert len(groups) > 1 and len(timeouts) == 1, timeouts

    assert on_ranks(2, compare) == [0, 0]

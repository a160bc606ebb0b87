"""What ranks tell each other: that one is still at work, messages on the way, and the memory that they have used."""

import pytest
import torch
from worlds import Ranks

from hfprune_dist.distributed.world import World


@pytest.mark.parametrize("size", [1, 3])
def test_the_most_memory_of_a_rank_is_told_and_of_no_gpu_what_was_reserved(size):
    (told, *others) = Ranks(size).run(lambda world: world.peak_memory())
    assert told.pop("peak_reserved_bytes") is None and told.pop("peak_memory_bytes") > 2**20 and not told
    assert all(other["peak_reserved_bytes"] is None for other in others)


def test_of_gpus_tensors_are_told_and_what_the_allocator_kept_for_them(monkeypatch):
    """Each is the maximum over ranks."""

    class OnGpus(World):
        def all_gather(self, value):
            return [value, (3, 900), (500, 4)]

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 200)
    told = OnGpus(0, 3, 3, torch.device("cuda", 0)).peak_memory()
    assert told == {"peak_memory_bytes": 500, "peak_reserved_bytes": 900}

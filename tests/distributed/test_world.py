"""What ranks tell each other: that one is still at work, messages on the way, and the memory that they have used."""

import threading

import pytest
import torch
from ranks import SoloWorld
from worlds import Ranks

from hfprune_dist.distributed import world as worlds
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError


def test_others_hear_that_the_first_rank_goes_on_however_long_its_work_takes(monkeypatch):
    """The work, in the calling thread, ends only once the others have been told three times."""
    monkeypatch.setattr(worlds, "TELL_EVERY_S", 0.001)
    told, heard_enough = [], threading.Event()

    class Told(SoloWorld):
        def broadcast(self, value, source=0):
            told.append(value)
            if len(told) == 3:
                heard_enough.set()
            return value

    def work():
        assert heard_enough.wait(60)
        return threading.current_thread()

    assert Told().on_first(work) is threading.current_thread()
    assert told[:3] == [None] * 3 and told[-1].result() is threading.current_thread()


@pytest.mark.parametrize("refused", [False, True])
def test_others_follow_the_messages_of_the_first_rank_until_it_is_done(refused):
    def work(world):
        followed = []

        def action(tell):
            for message in ("a", None, "b"):
                tell(message)
                if message:
                    world.barrier()
            if refused:
                raise UserError("no more")
            return "done"

        def follow(message):
            followed.append(message)
            world.barrier()

        if refused:
            with pytest.raises(UserError, match="no more"):
                world.let_first(action, follow)
        else:
            assert world.let_first(action, follow) == "done"
        return followed

    assert Ranks(3).run(work) == [[], ["a", "b"], ["a", "b"]]


def test_what_ranks_have_found_apart_is_known_to_all():
    assert Ranks(3).run(lambda world: world.work_apart(lambda: world.rank)) == [[0, 1, 2]] * 3


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

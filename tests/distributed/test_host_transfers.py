"""Copies in the background: each once, two at a time, in order, with the bits of plain copies, and none left over."""

import contextlib
import threading
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes import TO_DEVICE, TO_HOST, WEIGHTS, lanes
from ranks import SoloWorld
from refitting import MICRO_BATCH, checkpoint_in, refit, some_kept, weights_in, windows_of
from worlds import Ranks

from hfprune_dist.distributed import host_transfers
from hfprune_dist.distributed.host_transfers import CudaLanes, HostTransfers, one_ahead
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.models.single_layer import LayerReader, run
from hfprune_dist.refit.measurement import dense_outputs
from hfprune_dist.refit.norms_refit import NormGradients, PrunedLayers
from hfprune_dist.training.teacher_states import write_dense_states

DRAWN = settings(max_examples=60)
CPU = torch.device("cpu")


class FailedError(Exception):
    pass


class Flights:
    """Begins flights, of which some fail, and keeps track of them."""

    def __init__(self, fails=()):
        self.begun, self.alive, self.most = [], set(), 0
        self._fails = set(fails)

    def begin(self, item):
        self.fail("begin", item)
        self.begun.append(item)
        self.alive.add(item)
        self.most = max(self.most, len(self.alive))
        return partial(self._wait, item)

    def _wait(self, item):
        self.alive.remove(item)
        self.fail("wait", item)
        return item * 10

    def fail(self, what, item):
        if (what, item) in self._fails:
            raise FailedError


@DRAWN
@given(st.integers(0, 7), st.data())
def test_items_come_in_order_and_nothing_stays_on_its_way_wherever_it_ends(count, data):
    """The source of an item, its start, its arrival or its consumer fails, or nobody wants more items."""
    where = data.draw(st.integers(0, count))
    what = data.draw(st.sampled_from(["source", "begin", "wait", "consumer", "closed"]))
    flights, got = Flights([(what, where)]), []

    def items():
        for number in range(count):
            flights.fail("source", number)
            yield number, number

    ahead = one_ahead(items(), flights.begin)
    fails = what != "closed" and where < count
    with pytest.raises(FailedError) if fails else contextlib.nullcontext():
        for key, arrived in ahead:
            got.append(key)
            assert arrived == key * 10 and len(flights.begun) == min(key + 2, count)
            flights.fail("consumer", key)
            if what == "closed" and key == where:
                break
    ahead.close()
    # An item that fails on departure holds back the one before it.
    expected = max(where - 1, 0) if what in ("source", "begin") else where + (what in ("consumer", "closed"))
    assert got == list(range(expected if where < count else count))
    assert not flights.alive and flights.most <= 2


def test_the_cpu_copies_nothing():
    states, transfers = {3: torch.rand(4), 5: torch.rand(4)}, HostTransfers(CPU)
    for ways in (transfers.to_device, transfers.to_host, partial(transfers.through, compute=torch.relu_)):
        assert all(state is states[index] for index, state in ways(states.items()))


def test_two_layers_are_there_at_a_time(tmp_path):
    checkpoint = checkpoint_in(tmp_path / "model", layers=5)
    reader = LayerReader(checkpoint, torch.float32, CPU)
    hidden_BTC = torch.randn(2, 7, checkpoint.config["hidden_size"])
    with lanes() as made:
        for number, layer in HostTransfers(CPU).layers(reader, (0, 2, 3, 4)):
            assert torch.equal(run(layer, hidden_BTC), run(reader.layer(number), hidden_BTC))
            del layer
    (fake,) = made
    assert len(fake.copied[WEIGHTS]) == 4
    assert fake.most[WEIGHTS] == 2 * fake.copied[WEIGHTS][0]


@pytest.mark.parametrize(
    ("method", "staying"), [("dense", (0, 1, 2, 3)), ("layerwise", (1, 3)), ("block", (0, 1, 2, 3))], ids=str
)
def test_refits_have_the_bits_of_plain_copies(tmp_path, method, staying):
    checkpoint = checkpoint_in(tmp_path / "model", "qwen3", layers=4)
    options = {"windows_ST": windows_of(7), "dtype": torch.bfloat16, "world": SoloWorld()}
    kept = some_kept(staying)
    refit(method, checkpoint, kept, tmp_path / "plain", **options)
    with lanes() as made:
        refit(method, checkpoint, kept, tmp_path / "ahead", **options)
    assert weights_in(tmp_path / "ahead") == weights_in(tmp_path / "plain")
    assert any(fake.copied[TO_DEVICE] for fake in made)
    for fake in made:
        gap = 2 if len(staying) < 4 else 0  # the block before dropped layers holds them
        assert fake.most[WEIGHTS] <= (2 + gap) * max(fake.copied[WEIGHTS], default=0)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_micro_batch_goes_once_each_way_in_every_layer(tmp_path, ranks):
    """Bytes to main memory are the micro-batch's, in every layer and at the end; on any number of ranks."""
    checkpoint, windows_ST = checkpoint_in(tmp_path / "model", layers=3), windows_of(7)
    size, batches = checkpoint.config["hidden_size"], windows_ST.split(MICRO_BATCH)
    folders = [tmp_path / name for name in ("plain", "ahead")]
    for folder in folders:
        folder.mkdir()

    def work(folder):
        def of_rank(world):
            stream = LayerStream(checkpoint, windows_ST, torch.bfloat16, MICRO_BATCH, world)
            write_dense_states(stream, folder, world, lambda _done: None)

        return of_rank

    Ranks(ranks).run(work(folders[0]))
    with lanes() as made:
        Ranks(ranks).run(work(folders[1]))
    plain, ahead = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert ahead == plain and len(made) == ranks
    for way in (TO_DEVICE, TO_HOST):
        of_ranks = [Counter(fake.copied[way]) for fake in made]
        assert sum(of_ranks, Counter()) == Counter(it.numel() * size * 2 for it in batches for _ in range(3 + 1))


def test_gradients_at_norms_have_the_bits_of_plain_copies(tmp_path):
    checkpoint, batches = checkpoint_in(tmp_path / "model", layers=3), dict(enumerate(windows_of(5).split(2)))
    dense = dense_outputs(checkpoint, batches, torch.bfloat16, SoloWorld(), lambda _done: None)
    found = []
    for through in (contextlib.nullcontext([]), lanes()):
        with through as made:
            pruned = PrunedLayers(checkpoint, some_kept((0, 2)), {}, torch.bfloat16, SoloWorld().device)
            gradients = NormGradients(pruned, batches, dense, world=SoloWorld(), after_each=lambda _done: None)
            found.append(gradients.at(torch.ones(gradients.shape, dtype=torch.float64)))
    plain, ahead = found
    assert ahead.kl == plain.kl and torch.equal(ahead.gradient_RC, plain.gradient_RC)
    (fake,) = made
    sizes = Counter(2 * it.numel() * checkpoint.config["hidden_size"] for it in batches.values())
    assert Counter(fake.copied[TO_HOST]) == Counter({it: 5 * n for it, n in sizes.items()})
    assert Counter(fake.copied[TO_DEVICE]) == Counter({it: 8 * n for it, n in sizes.items()})
    assert fake.most[TO_DEVICE] <= 4 * max(sizes)


class FakeStream:
    """A log of everything that ``CudaLanes`` asks of a stream, without a GPU."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def record_event(self):
        return self

    def synchronize(self):
        self.log.append(("host", "waits for", self.name))


@pytest.fixture
def log(monkeypatch):
    """CUDA's streams and pinned memory as ``CudaLanes`` sees them, on a machine without either."""
    log, plain_empty_like = [], torch.empty_like
    names = iter(("inward", "outward", "files"))

    def empty_like(tensor, **options):
        assert options.pop("pin_memory", True)
        return plain_empty_like(tensor, **options)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append((threading.get_ident(), "uses", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: FakeStream(log, next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: FakeStream(log, "computing"))
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(("shared with", stream.name)))
    monkeypatch.setattr(host_transfers, "lanes_of", CudaLanes)
    host_transfers._streams.cache_clear()
    yield log
    host_transfers._streams.cache_clear()


def test_a_gpus_copies_wait_for_what_was_computed_and_the_host_for_them_in_the_same_streams(log):
    states = {index: torch.randn(3, index + 1).T for index in range(2)}  # not contiguous
    for _ in range(3):
        made = dict(HostTransfers(CPU).through(states.items(), lambda it: it + 1))
        assert all(torch.equal(made[index], states[index] + 1) for index in states)
    for way in ("inward", "outward"):
        assert log.count((way, "waits for", "computing")) == log.count(("host", "waits for", way)) == 6
    begin, here = ("inward", "waits for", "computing"), ("host", "waits for", "inward")
    assert log[:3] == [begin, begin, here]


@pytest.mark.parametrize("fails_at", [None, 1])
def test_a_gpus_layers_are_read_by_a_thread_whose_errors_are_those_of_whoever_asks(
    log, tmp_path, monkeypatch, fails_at
):
    reader = LayerReader(checkpoint_in(tmp_path / "model", layers=3), torch.bfloat16, CPU)
    threads, plain_weights = set(), reader.weights

    def weights(number, place):
        threads.add(threading.get_ident())
        if number == fails_at:
            raise OSError("stale file handle")
        return plain_weights(number, place)

    seen = []
    with (
        contextlib.nullcontext() if fails_at is None else pytest.raises(OSError, match="stale"),
        monkeypatch.context() as patch,
    ):
        patch.setattr(reader, "weights", weights)
        for number, layer in HostTransfers(CPU).layers(reader, range(3)):
            seen.append((number, layer.state_dict()))
    assert [number for number, _ in seen] == list(range(3 if fails_at is None else fails_at))
    for number, found in seen:
        whole = reader.layer(number).state_dict()
        assert all(torch.equal(weight, whole[name]) for name, weight in found.items())
    (thread,) = threads - {threading.get_ident()}
    assert log.count((thread, "uses", CPU)) == 1, "or it would use the first GPU"
    assert ("shared with", "computing") in log

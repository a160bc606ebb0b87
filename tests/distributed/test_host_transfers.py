"""Copies in the background: each once, two at a time, in order, with the bits of plain copies, and none left over."""

import contextlib
import threading
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lanes import TO_DEVICE, TO_HOST, WEIGHTS, FakeLanes, lanes
from ranks import SoloWorld
from refitting import MICRO_BATCH, checkpoint_in, refit, some_kept, weights_in, windows_of
from worlds import Ranks

from hfprune_dist.distributed import host_transfers
from hfprune_dist.distributed.host_transfers import CudaLanes, HostTransfers, one_ahead
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.models.single_layer import LayerReader, run
from hfprune_dist.refit.measurement import Measurement, dense_outputs, one_by_one
from hfprune_dist.refit.norm_gradients import NormGradients
from hfprune_dist.refit.pruned_layers import PrunedLayers
from hfprune_dist.training.teacher_states import write_dense_states

DRAWN = settings(derandomize=True, deadline=None, max_examples=60)
CPU = torch.device("cpu")


class FailedError(Exception):
    pass


class Flights:
    """Begins flights and keeps track of them."""

    def __init__(self, fails=()):
        self.begun, self.waited, self.alive = [], [], set()
        self.most = 0
        self._fails = set(fails)

    def begin(self, item):
        if ("begin", item) in self._fails:
            raise FailedError
        self.begun.append(item)
        self.alive.add(item)
        self.most = max(self.most, len(self.alive))
        return _Flight(self, item)

    def fail(self, what, item):
        if (what, item) in self._fails:
            raise FailedError


class _Flight:
    def __init__(self, flights, item):
        self._flights, self._item = flights, item

    def wait(self):
        self._flights.fail("wait", self._item)
        self._flights.waited.append(self._item)
        return self._item * 10

    def settle(self):
        self._flights.alive.discard(self._item)


@DRAWN
@given(st.integers(0, 9))
def test_every_item_comes_once_in_order_and_the_next_is_on_its_way(count):
    flights, ahead = Flights(), []
    for place, (key, value) in enumerate(one_ahead(((f"item {it}", it) for it in range(count)), flights.begin)):
        assert (key, value) == (f"item {place}", place * 10)
        ahead.append(len(flights.begun) - place - 1)
    assert flights.begun == flights.waited == list(range(count))
    assert ahead == [1] * (count - 1) + [0] * (count > 0)
    assert flights.most == min(count, 2) and not flights.alive


@DRAWN
@given(st.integers(1, 7), st.data())
def test_nothing_stays_on_its_way_wherever_it_ends(count, data):
    """The source of an item, its start, its arrival or its consumer fails, or nobody wants more items."""
    where = data.draw(st.integers(0, count - 1))
    what = data.draw(st.sampled_from(["source", "begin", "wait", "consumer", "closed"]))
    flights, got = Flights([(what, where)]), []

    def items():
        for number in range(count):
            flights.fail("source", number)
            yield number, number

    ahead = one_ahead(items(), flights.begin)
    with pytest.raises(FailedError) if what != "closed" else contextlib.nullcontext():
        for key, _ in ahead:
            got.append(key)
            flights.fail("consumer", key)
            if what == "closed" and key == where:
                break
    ahead.close()
    # An item that fails on departure holds back the one before it.
    expected = max(where - 1, 0) if what in ("source", "begin") else where + (what in ("consumer", "closed"))
    assert got == list(range(expected))
    assert not flights.alive and len(set(flights.begun)) == len(flights.begun)


@DRAWN
@given(st.integers(0, 6), st.integers(1, 5))
@example(6, 4)
def test_two_micro_batches_each_way_are_there_at_a_time_and_bits_are_those_of_plain_copies(count, tokens):
    states = {index: torch.randn(2, tokens, 8) for index in range(count)}
    fake = FakeLanes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_transfers, "lanes_of", lambda _device: fake)
        made = dict(HostTransfers(CPU).through(states.items(), lambda it: it.sin()))
    assert list(made) == list(states)
    assert all(torch.equal(made[index], state.sin()) for index, state in states.items())
    size = 2 * tokens * 8 * 4
    assert fake.copied == {TO_DEVICE: [size] * count, TO_HOST: [size] * count, WEIGHTS: []}
    assert not fake.on_the_way
    assert fake.most[TO_DEVICE] == fake.most[TO_HOST] == min(count, 2) * size
    assert all(fake.most[f"pinned {way}"] <= 2 * (1 << (size - 1).bit_length()) for way in (TO_DEVICE, TO_HOST))


def test_the_cpu_copies_nothing():
    states, transfers = {3: torch.rand(4), 5: torch.rand(4)}, HostTransfers(CPU)
    for ways in (transfers.to_device, transfers.to_host, partial(transfers.through, compute=torch.relu_)):
        assert all(state is states[index] for index, state in ways(states.items()))


def test_two_layers_are_there_at_a_time(tmp_path):
    checkpoint = checkpoint_in(tmp_path / "model", layers=5)
    reader = LayerReader(checkpoint, torch.float32, CPU)
    hidden_BTC = torch.randn(2, 7, checkpoint.config["hidden_size"])
    plain = [run(reader.layer(number), hidden_BTC) for number in (0, 2, 3, 4)]
    with lanes() as made:
        outputs = []
        for number, layer in HostTransfers(CPU).layers(reader, (0, 2, 3, 4)):
            outputs.append((number, run(layer, hidden_BTC)))
            del layer
    (fake,) = made
    assert [number for number, _ in outputs] == [0, 2, 3, 4]
    assert all(torch.equal(ours, theirs) for (_, ours), theirs in zip(outputs, plain, strict=True))
    assert len(fake.copied[WEIGHTS]) == 4
    assert fake.most[WEIGHTS] == 2 * fake.copied[WEIGHTS][0]


REFITS = ["dense", "layerwise", "block"]


@pytest.mark.parametrize("method", REFITS)
@pytest.mark.parametrize("staying", [(0, 1, 2, 3), (1, 3)], ids=["all layers", "gaps"])
def test_refits_have_the_bits_of_plain_copies(tmp_path, method, staying):
    checkpoint = checkpoint_in(tmp_path / "model", "qwen3", layers=4)
    options = {"windows_ST": windows_of(7), "dtype": torch.bfloat16}
    kept = some_kept(staying)
    refit(method, checkpoint, kept, tmp_path / "plain", world=SoloWorld(), **options)
    with lanes() as made:
        refit(method, checkpoint, kept, tmp_path / "ahead", world=SoloWorld(), **options)
    assert weights_in(tmp_path / "ahead") == weights_in(tmp_path / "plain")
    assert any(fake.copied[TO_DEVICE] for fake in made) and not any(fake.on_the_way for fake in made)
    for fake in made:
        gap = 2 if len(staying) < 4 and method != "dense" else 0  # the block before dropped layers holds them
        assert fake.most[WEIGHTS] <= (2 + gap) * max(fake.copied[WEIGHTS], default=0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_micro_batch_goes_once_each_way_in_every_layer(tmp_path, ranks):
    """Bytes to main memory are the micro-batch's, in every layer and at the end; on any number of ranks."""
    checkpoint, windows_ST = checkpoint_in(tmp_path / "model", layers=3), windows_of(7)
    size, batches = checkpoint.config["hidden_size"], windows_ST.split(MICRO_BATCH)
    folders = [tmp_path / name for name in ("plain", "ahead")]
    for folder in folders:
        folder.mkdir()

    def work(folder):
        def of_rank(world):
            where = checkpoint, windows_ST, torch.bfloat16, MICRO_BATCH, world
            stream = LayerStream(*where)
            write_dense_states(stream, stream.states_in(tmp_path / "states"), folder, world, lambda _done: None)

        return of_rank

    Ranks(ranks).run(work(folders[0]))
    with lanes() as made:
        Ranks(ranks).run(work(folders[1]))
    plain, ahead = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert ahead == plain and len(made) == ranks
    for way in (TO_DEVICE, TO_HOST):
        of_ranks = [Counter(fake.copied[way]) for fake in made]
        assert sum(of_ranks, Counter()) == Counter(it.numel() * size * 2 for it in batches for _ in range(3 + 1))
        shares = sorted(4 * len(batches[rank::ranks]) for rank in range(ranks))
        assert sorted(it.total() for it in of_ranks) == shares


# In every layer, the dense model's windows move before and after its MLP, and then the pruned model's windows do.
TIMES = {"dense": 1, "layerwise": 4, "block": 4 + 1}  # the MLP's input


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("method", REFITS)
def test_bytes_that_a_refit_brings_to_main_memory(tmp_path, method, ranks):
    """A micro-batch's states this many times in every layer, and float32 targets of steps; summed over all ranks."""
    checkpoint, windows_ST, kept = checkpoint_in(tmp_path / "model", layers=3), windows_of(7), some_kept((0, 1, 2))
    options = {"windows_ST": windows_ST, "dtype": torch.bfloat16}
    with lanes() as made:
        Ranks(ranks).run(lambda world: refit(method, checkpoint, kept, tmp_path / "refit", world=world, **options))
    found = sum((Counter(fake.copied[TO_HOST]) for fake in made), Counter())
    expected = Counter()
    for batch in windows_ST.split(MICRO_BATCH):
        numbers = batch.numel() * checkpoint.config["hidden_size"]
        expected[2 * numbers] += 3 * TIMES[method]
        expected[4 * numbers] += 3 * (method == "block")
    assert found == +expected


def test_measurements_have_the_bits_of_plain_copies(tmp_path):
    checkpoint, batches = checkpoint_in(tmp_path / "model", layers=3), one_by_one(windows_of(3))
    options = {"dtype": torch.bfloat16, "world": SoloWorld(), "after_each": lambda _done: None}
    found = []
    for name, through in (("plain", contextlib.nullcontext()), ("ahead", lanes())):
        with through:
            dense = dense_outputs(checkpoint, batches, torch.bfloat16, SoloWorld(), lambda _done: None)
            measured = Measurement(
                checkpoint, Same, batches, reference=lambda it=dense: it, every=2, folder=tmp_path / name, **options
            )
            found.append((dense, measured.kl([(None, (1,), (1,)), ((1,), (1,), (1,)), ((1,), None, (1,))])))
    (plain, kls), (ahead, same_kls) = found
    assert kls == same_kls and kls[1] == 0 < kls[0] and all(torch.equal(ahead[it], plain[it]) for it in plain)


def test_gradients_at_norms_have_the_bits_of_plain_copies(tmp_path):
    """Micro-batches of both models, and gradients, go to the device once for each part; a result comes back from it."""
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
    assert not fake.on_the_way and Counter(fake.copied[TO_HOST]) == Counter({it: 5 * n for it, n in sizes.items()})
    assert Counter(fake.copied[TO_DEVICE]) == Counter({it: 8 * n for it, n in sizes.items()})
    assert fake.most[TO_DEVICE] <= 4 * max(sizes)


class Same:
    """``Variants`` that change nothing."""

    def weights(self, _number, _layer, choices):
        return {choice: {} for choice in choices}

    def go_past(self, layer):
        pass


class FakeStream:
    """A log of everything that ``CudaLanes`` asks of a stream, without a GPU."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event.name))

    def record_event(self):
        return FakeEvent(self.log, f"copy of {self.name}")


class FakeEvent:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def synchronize(self):
        self.log.append(("host", "waits for", self.name))


@pytest.fixture
def log(monkeypatch):
    """CUDA's streams and pinned memory as ``CudaLanes`` sees them, on a machine without either."""
    log = []
    computing = FakeStream(log, "computing")
    names = iter(("inward", "outward", "files"))
    plain_empty_like, used = torch.empty_like, threading.local()

    @contextlib.contextmanager
    def inside(stream):
        before, used.stream = getattr(used, "stream", "computing"), stream.name
        yield
        used.stream = before

    def empty_like(tensor, **options):
        assert options.pop("pin_memory", True)
        return plain_empty_like(tensor, **options)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append((threading.get_ident(), "uses", device)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: FakeStream(log, next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computing)
    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(("shared with", stream.name)))
    monkeypatch.setattr(host_transfers, "lanes_of", CudaLanes)
    host_transfers._streams.cache_clear()
    yield log
    host_transfers._streams.cache_clear()


def test_a_gpus_copies_wait_for_what_was_computed_and_what_is_computed_waits_for_them(log):
    states = {index: torch.randn(3, index + 1).T for index in range(2)}  # not contiguous
    made = dict(HostTransfers(CPU).through(states.items(), lambda it: it + 1))
    assert all(torch.equal(made[index], states[index] + 1) for index in states)
    begin, arrive = ("inward", "waits for", "computing"), ("computing", "waits for", "copy of inward")
    back, here = ("outward", "waits for", "computing"), ("host", "waits for", "copy of outward")
    assert [it for it in log if it != ("host", "waits for", "copy of inward")][:4] == [begin, begin, arrive, back]
    assert log.count(begin) == log.count(arrive) == log.count(back) == 2 and log.count(here) >= 2


def test_later_passes_copy_in_the_same_streams_or_memory_would_stay_with_those_of_earlier_ones(log, monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: made.append(FakeStream(log, len(made))) or made[-1])
    for _ in range(3):
        dict(HostTransfers(CPU).through({0: torch.ones(2)}.items(), lambda it: it + 1))
    assert len(made) == 3 and all(log.count((stream.name, "waits for", "computing")) == 3 for stream in made[:2])


def test_a_gpus_layers_are_read_in_portions_by_a_thread(log, tmp_path, monkeypatch):
    monkeypatch.setattr(host_transfers, "PINNED_BYTES", 1000)
    checkpoint = checkpoint_in(tmp_path / "model", layers=3)
    reader = LayerReader(checkpoint, torch.bfloat16, CPU)
    threads = set()
    plain_weights = reader.weights
    monkeypatch.setattr(reader, "weights", lambda *it: threads.add(threading.get_ident()) or plain_weights(*it))
    for number, layer in HostTransfers(CPU).layers(reader, range(3)):
        whole = reader.layer(number).state_dict()
        assert all(torch.equal(weight, whole[name]) for name, weight in layer.state_dict().items())
    (thread,) = threads - {threading.get_ident()}
    assert log.count((thread, "uses", CPU)) == 1, "or it would use the first GPU"
    tensors = plain_weights(0, lambda tensor, _dtype: tensor)
    portions = sum(-(-tensor.numel() // 500) for tensor in tensors.values())
    assert log.count(("shared with", "computing")) == 3 * len(tensors)
    # Awaited when they arrive or are settled: nothing on the device waits for weights.
    assert Counter(log)["host", "waits for", "copy of files"] >= 3 * portions
    assert not [it for it in log if it[0] == "computing"]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_fails_in_the_thread_is_the_error_of_whoever_asks_for_the_layer(log, tmp_path, monkeypatch, where):
    reader = LayerReader(checkpoint_in(tmp_path / "model", layers=3), torch.float32, CPU)
    plain_weights = reader.weights

    def failing(number, place):
        if number == where:
            raise OSError(f"layer {number}: stale file handle")
        return plain_weights(number, place)

    monkeypatch.setattr(reader, "weights", failing)
    seen = []
    with pytest.raises(OSError, match=f"layer {where}: stale"):
        for number, _ in HostTransfers(CPU).layers(reader, range(3)):
            seen.append(number)
    assert seen == list(range(where))

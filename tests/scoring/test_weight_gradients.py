"""Gradients of weights over any number of ranks, and passes that are resumed."""

import errno
import os
from pathlib import Path

import pytest
import torch
from damage import nothing_reaches_the_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Death, Ranks

from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.unit_sums import KindSums
from hfprune_dist.scoring import layer_sums, shard_sums
from hfprune_dist.scoring.kind_totals import KindSizes
from hfprune_dist.scoring.shard_scorer import SumsOfShard
from hfprune_dist.scoring.shard_sums import Accumulation
from hfprune_dist.scoring.weight_gradients import WeightGradients

TOKENS = 3


@pytest.fixture(scope="module", autouse=True)
def fast():
    with nothing_reaches_the_disk():
        yield


@st.composite
def all_sizes(draw):
    """Draw sizes of weights by name; each layer has its own number of rows."""
    layers, names = draw(st.integers(1, 4)), draw(st.sampled_from((("up",), ("up", "down", "q"))))
    side = st.integers(1, 7)
    return {name: [(draw(side), draw(side)) for _ in range(layers)] for name in names}


def seen_of(batch, layer, name, size):
    """Return a linear layer's inputs and output gradients, of the size of the weight at that place."""
    generator = torch.Generator().manual_seed(1000 * batch + 10 * layer + len(name))
    return tuple(torch.randn(TOKENS, it, generator=generator) * 10.0 ** (len(name) - 3) for it in reversed(size))


def show(gradients, batch, sizes, *, counts):
    """Show the gradients as the backward of a micro-batch does."""
    seeing = gradients.seeing(counts=counts)
    for layer in reversed(range(len(next(iter(sizes.values()))))):
        for name, of_layers in sizes.items():
            seeing[name][layer](*seen_of(batch, layer, name, of_layers[layer]))


def totals_of(world, folder, sizes, batches):
    """Deal micro-batches out to ranks that go in step: a rank with none left takes part, but doesn't count."""
    gradients = WeightGradients(sizes, folder, world)
    for first in range(0, batches, world.size):
        mine = first + world.rank
        show(gradients, min(mine, batches - 1), sizes, counts=mine < batches)
    gradients.end_shard()
    gradients.save(batches)
    world.barrier()
    return {
        (name, layer): gradients.value(name, layer, batches)
        for name, of_layers in sizes.items()
        for layer in range(len(of_layers))
    }


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=all_sizes(), ranks=st.integers(1, 5), batches=st.integers(1, 7), is_large=st.booleans())
def test_they_are_the_sum_over_all_ranks_windows(tmp_path_factory, sizes, ranks, batches, is_large):
    folder = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        if is_large:
            patch.setattr(layer_sums, "LAYER_SUMS_BYTES", 0)
        found = Ranks(ranks).run(lambda world: totals_of(world, folder, sizes, batches))
    for (name, layer), total in found[0].items():
        seen = [seen_of(batch, layer, name, sizes[name][layer]) for batch in range(batches)]
        expected = sum(gradients.double().T @ inputs.double() for inputs, gradients in seen)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert all(torch.equal(it[name, layer], total) for it in found)


# A pass for gradients of weights, with or without sums of units as well.
LAYERS, SHARDS = 3, 5
SIZES = {"mlp.up_proj.weight": [(6, 4)] * LAYERS, "mlp.down_proj.weight": [(4, 6)] * LAYERS}
SHAPES = {"neurons": KindSizes((6,) * LAYERS, 1, 4)}


def accumulated(world, file, criteria, rounds=SHARDS):
    chosen = [CRITERIA[name] for name in criteria]
    options = {"weights": SIZES}
    totals = Accumulation(chosen, SHAPES, SHARDS, file, world, **options)
    begun_at = totals.next_shard
    while not totals.is_complete and rounds > 0:
        show(totals.gradients, totals.own_shard, SIZES, counts=totals.own_shard_counts)
        generator = torch.Generator().manual_seed(totals.own_shard)
        entropy = {"entropy": torch.rand(LAYERS, 6, generator=generator).double()} if "entropy" in criteria else {}
        losses = {criterion.loss.name: 1.0 + totals.own_shard for criterion in chosen}
        totals.add_round(SumsOfShard({"neurons": KindSums(entropy)}, losses))
        rounds -= 1
    return totals, begun_at


def assert_same(totals, expected):
    assert totals.next_shard == expected.next_shard and totals.losses == expected.losses
    for name in SIZES:
        for layer in range(LAYERS):
            windows = totals.next_shard
            gradient = totals.mean_gradient(name, layer, windows)
            torch.testing.assert_close(gradient, expected.mean_gradient(name, layer, windows))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 4),
    later=st.integers(1, 4),
    dies_at=st.floats(0, 0.999),
    beside=st.booleans(),
    seldom=st.booleans(),
)
def test_a_pass_that_died_goes_on_from_what_it_saved(tmp_path_factory, size, later, dies_at, beside, seldom):
    criteria = ["weight_taylor", *(["entropy"] if beside else [])]
    expected, _ = accumulated(SoloWorld(), tmp_path_factory.mktemp("one") / "partial", criteria)
    with pytest.MonkeyPatch.context() as patch:
        if seldom:
            patch.setattr(shard_sums, "BYTES_SAVED_A_ROUND", 1000)
        whole = Ranks(size)
        file = tmp_path_factory.mktemp("many") / "partial"
        for totals, _ in whole.run(lambda world: accumulated(world, file, criteria)):
            assert_same(totals, expected)
        killed = tmp_path_factory.mktemp("killed") / "partial"
        mortal = Ranks(size, deaths={size - 1: int(dies_at * len(whole.logs[size - 1]))})
        with pytest.raises(Death):
            mortal.run(lambda world: accumulated(world, killed, criteria))
        for totals, _ in Ranks(later).run(lambda world: accumulated(world, killed, criteria)):
            assert_same(totals, expected)
    assert sorted(it.name for it in (killed.parent / "gradients").iterdir()) == [str(expected.next_shard)]


@pytest.mark.parametrize("how", ["missing", "another"])
def test_a_pass_whose_gradients_are_missing_or_of_another_begins_anew(tmp_path, capsys, how):
    file, criteria = tmp_path / "partial", ["weight_taylor"]
    expected, _ = accumulated(SoloWorld(), tmp_path / "other" / "partial", criteria)
    accumulated(SoloWorld(), file, criteria, rounds=2)
    lost = tmp_path / "gradients" / "2" / "mlp.up_proj.weight-1.safetensors"
    if how == "missing":
        lost.unlink()
    else:
        lost.write_bytes((lost.parent / "mlp.down_proj.weight-1.safetensors").read_bytes())
    totals, begun_at = accumulated(SoloWorld(), file, criteria)
    assert begun_at == 0
    assert_same(totals, expected)
    assert "goes with mlp.up_proj.weight-1.safetensors" in capsys.readouterr().out


def test_a_whole_file_is_taken_up(tmp_path):
    accumulated(SoloWorld(), tmp_path / "partial", ["weight_taylor"], rounds=3)
    _, begun_at = accumulated(SoloWorld(), tmp_path / "partial", ["weight_taylor"])
    assert begun_at == 3


def test_what_is_resumed_outlives_its_file(tmp_path):
    """Whoever saves a later state removes it, perhaps on another host, and with it what a view has yet to read."""
    sizes = {"up": [(2, 3)]}
    gradients = WeightGradients(sizes, tmp_path, SoloWorld())
    show(gradients, 0, sizes, counts=True)
    gradients.save(1)
    resumed = WeightGradients(sizes, tmp_path, SoloWorld())
    assert resumed.resume(1) == ""
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_state_that_can_not_be_removed_yet_is_removed_with_the_next(tmp_path, monkeypatch):
    """On NFS, a folder stays as long as somebody has a file in it open."""
    sizes = {"up": [(2, 3)]}
    gradients = WeightGradients(sizes, tmp_path, SoloWorld())
    for saved in (1, 2):
        show(gradients, saved - 1, sizes, counts=True)
        gradients.save(saved)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        gradients.keep_only(2)
    assert sorted(it.name for it in tmp_path.iterdir()) == ["1", "2"]
    gradients.keep_only(2)
    assert [it.name for it in tmp_path.iterdir()] == ["2"]


def refuse(*_, **__):
    raise OSError(errno.ENOTEMPTY, "Directory not empty")

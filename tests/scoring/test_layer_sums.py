"""Sums of matrices by layer: what they are on any number of ranks, who saves them, and what damage leaves of them."""

import errno
import os
from pathlib import Path

import pytest
import torch
from damage import nothing_reaches_the_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Ranks

from hfprune_dist.errors import UserError
from hfprune_dist.scoring.layer_sums import LayerSums


@pytest.fixture(scope="module", autouse=True)
def fast():
    with nothing_reaches_the_disk():
        yield


@st.composite
def all_sizes(draw):
    """Draw sizes of matrices by name; each layer has its own."""
    layers, names = draw(st.integers(1, 4)), draw(st.sampled_from((("up",), ("up", "down", "q"))))
    side = st.integers(1, 7)
    return {name: [(draw(side), draw(side)) for _ in range(layers)] for name in names}


def term(batch, layer, name, size):
    generator = torch.Generator().manual_seed(1000 * batch + 10 * layer + len(name))
    return torch.randn(size, generator=generator) * 10.0 ** (len(name) - 3)


def show(sums, batch, *, counts):
    """Add terms as the backward of a micro-batch does."""
    for layer in reversed(range(len(next(iter(sums.sizes.values()))))):
        for name, of_layers in sums.sizes.items():
            sums.add(name, layer, term(batch, layer, name, of_layers[layer]) if counts else None)


def totals_of(world, folder, sizes, batches):
    """Deal micro-batches out to ranks that go in step: a rank with none left takes part, but doesn't count."""
    sums = LayerSums(sizes, folder, world)
    for first in range(0, batches, world.size):
        show(sums, first + world.rank, counts=first + world.rank < batches)
    sums.require_finite()
    sums.save(batches)
    world.barrier()
    places = [(name, layer) for name, of_layers in sizes.items() for layer in range(len(of_layers))]
    return {place: sums.value(*place) for place in places}


@settings(max_examples=20)
@given(sizes=all_sizes(), ranks=st.integers(1, 5), batches=st.integers(1, 7))
def test_they_are_the_sum_over_all_ranks(tmp_path_factory, sizes, ranks, batches):
    folder = tmp_path_factory.mktemp("many")
    found = Ranks(ranks).run(lambda world: totals_of(world, folder, sizes, batches))
    for (name, layer), total in found[0].items():
        expected = sum(term(batch, layer, name, sizes[name][layer]).double() for batch in range(batches))
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert all(torch.equal(it[name, layer], total) for it in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_the_layer_that_backward_met_first(tmp_path, value):
    sums = LayerSums({"neurons": [(3, 3)] * 3}, tmp_path, SoloWorld())
    sums.require_finite()
    for lost in range(2):
        sums.add("neurons", lost, torch.full((3, 3), value))
    with pytest.raises(UserError, match=r"gradients of neurons in layer 1 are NaN or infinite"):
        sums.require_finite()


def test_what_is_resumed_outlives_its_file(tmp_path):
    """Whoever saves a later state removes it, perhaps on another host, and with it what a view has yet to read."""
    sums, resumed = (LayerSums({"up": [(2, 3)]}, tmp_path, SoloWorld()) for _ in range(2))
    show(sums, 0, counts=True)
    sums.save(1)
    assert resumed.resume(1)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_state_that_can_not_be_removed_yet_is_removed_with_the_next(tmp_path, monkeypatch):
    """On NFS, a folder stays as long as somebody has a file in it open."""

    def refuse(*_, **__):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    sums = LayerSums({"up": [(2, 3)]}, tmp_path, SoloWorld())
    for saved in (1, 2):
        show(sums, saved - 1, counts=True)
        sums.save(saved)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        sums.drop_earlier()
    assert sorted(it.name for it in tmp_path.iterdir()) == ["1", "2"]
    sums.drop_earlier()
    assert [it.name for it in tmp_path.iterdir()] == ["2"]

"""Sums over shards, on any number of ranks, after a death at any write, and after damage to a file."""

from pathlib import Path

import pytest
import torch
from damage import DAMAGES, damage, nothing_reaches_the_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Death, Ranks

from hfprune_dist.checkpoints import tensor_files
from hfprune_dist.errors import UserError
from hfprune_dist.scoring import accumulation
from hfprune_dist.scoring.accumulation import Accumulation


@pytest.fixture(scope="module", autouse=True)
def fast():
    with nothing_reaches_the_disk():
        yield


LAYERS, HIDDEN, SHARDS = 2, 3, 5
# Names of sums and their sizes; names of matrices and their sizes in each layer.
SIZES = {"layers.0.entropy": 6, "layers.1.entropy": 4, "layers.0.kv_groups.activation_l1": 8, "loss.entropy": 1}
MATRICES = {"kv_groups": [(HIDDEN, HIDDEN)] * LAYERS, "up": [(6, HIDDEN)] * LAYERS}


def adding(term):
    return lambda total: total.add_(term)


def full_shard(totals, number, counts):
    generator = torch.Generator().manual_seed(number)
    for layer in reversed(range(LAYERS)):  # as a backward does
        for name, of_layers in MATRICES.items():
            term = torch.randn(of_layers[layer], generator=generator)
            totals.add_to_matrix(name, layer, adding(term) if counts else None)
    return {name: torch.rand(size, generator=generator).double() for name, size in SIZES.items()}


def begun(file, world):
    return Accumulation(SHARDS, file, world, MATRICES)


def add_rounds(file, rounds=SHARDS, world=None):
    """Add up to so many rounds; return the totals, and the number of shards after each."""
    totals, where = begun(file, world or SoloWorld()), []
    while not totals.is_complete and len(where) < rounds:
        totals.add_round(lambda shard, counts: full_shard(totals, shard, counts))
        where.append(totals.next_shard)
    return totals, where


def assert_same(totals, expected):
    assert totals.next_shard == expected.next_shard and totals.sums.keys() == expected.sums.keys()
    assert all(torch.equal(totals.sums[name], it) for name, it in expected.sums.items())
    for name in MATRICES:
        for layer in range(LAYERS):
            found, wanted = (it.matrix(name, layer) for it in (totals, expected))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return add_rounds(tmp_path_factory.mktemp("expected") / "partial.safetensors")[0]


@settings(max_examples=25)
@given(
    rounds=st.integers(1, SHARDS),
    damaged=st.sampled_from((None, "matrices/{}/layer-1.safetensors")),
    how=DAMAGES | st.none(),
)
def test_after_a_damaged_or_missing_file_the_pass_begins_anew(tmp_path_factory, expected, rounds, damaged, how):
    """It may be the file that says where the pass is, or one that goes with it."""
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / "partial.safetensors"
    add_rounds(file, rounds)
    victim = file if damaged is None else folder / damaged.format(rounds)
    if how is None:
        victim.unlink()
    elif not damage(victim, *how):
        return
    assert_same(add_rounds(file)[0], expected)


@pytest.mark.parametrize("moment", ["before it has its name", "once it has its name"])
def test_death_at_any_write_of_any_round_ends_with_the_same_sums(tmp_path, monkeypatch, expected, moment):
    publish, writes = tensor_files.publish, [0]

    def counted(draft, file):
        writes[0] += 1
        if writes[0] == dies_at and moment == "before it has its name":
            raise Death
        publish(draft, file)
        if writes[0] == dies_at:
            raise Death

    monkeypatch.setattr(tensor_files, "publish", counted)
    for dies_at in range(1, SHARDS * (LAYERS + 1) + 1):
        writes[0], file = 0, tmp_path / str(dies_at) / "partial.safetensors"
        with pytest.raises(Death):
            add_rounds(file)
        assert_same(add_rounds(file)[0], expected)
        # A death when the pass was complete leaves the state before it, until the stage is done.
        assert {it.name for it in (file.parent / "matrices").iterdir()} - {str(SHARDS - 1)} == {str(SHARDS)}


@settings(max_examples=25)
@given(size=st.integers(1, 5), later=st.integers(1, 5), rounds=st.integers(1, SHARDS), ends=st.booleans())
def test_where_ranks_own_much_not_every_round_is_saved_and_nothing_is_lost_at_an_end_that_is_asked_for(
    tmp_path_factory, expected, size, later, rounds, ends
):
    file = tmp_path_factory.mktemp("seldom") / "partial.safetensors"
    owned = 8 * -(-LAYERS // size) * (HIDDEN**2 + 6 * HIDDEN)

    def go_on(world, rounds, saves):
        begun_at = begun(file, world).next_shard
        totals, where = add_rounds(file, rounds, world)
        if saves:
            totals.save()
        return totals, begun_at, where

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulation, "BYTES_SAVED_A_ROUND", -(-owned // 2))
        (_, begun_at, where), *_ = Ranks(size).run(lambda world: go_on(world, rounds, ends))
        assert begun_at == 0
        saved = where[-1] if ends else [0, *where][len(where) // 2 * 2]
        for totals, begun_at, _ in Ranks(later).run(lambda world: go_on(world, SHARDS, True)):
            assert begun_at == saved
            assert_same(totals, expected)
    assert sorted(it.name for it in (file.parent / "matrices").iterdir()) == [str(SHARDS)]


def accumulated(folder, world, sizes, shards):
    """Return the sums of some matrices over shards of one micro-batch each."""
    totals = Accumulation(shards, folder / "partial.safetensors", world, sizes)

    def score(shard, counts):
        for layer in reversed(range(len(sizes["up"]))):
            for name, of_layers in sizes.items():
                totals.add_to_matrix(
                    name, layer, adding(term(shard, name, layer, of_layers[layer])) if counts else None
                )
        return {"loss": torch.zeros(1).double()}

    while not totals.is_complete:
        totals.add_round(score)
    return {(name, layer): totals.matrix(name, layer) for name, it in sizes.items() for layer in range(len(it))}


def term(shard, name, layer, size):
    generator = torch.Generator().manual_seed(1000 * shard + 10 * layer + len(name))
    return torch.randn(size, generator=generator) * 10.0 ** (len(name) - 3)


@settings(max_examples=20)
@given(
    ranks=st.integers(1, 5),
    shards=st.integers(1, 7),
    sides=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    fits=st.booleans(),
)
def test_matrices_are_the_sums_over_all_ranks(tmp_path_factory, ranks, shards, sides, fits):
    """Each layer has matrices of its own sizes; the terms of a round fit on each rank, or are reduced at once."""
    folder = tmp_path_factory.mktemp("many")
    sizes = {"up": [(side, 3) for side in sides], "down": [(2, side) for side in sides]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accumulation, "OWN_TERMS_BYTES", 2**20 if fits else 0)
        found = Ranks(ranks).run(lambda world: accumulated(folder, world, sizes, shards))
    for (name, layer), total in found[0].items():
        expected = sum(term(shard, name, layer, sizes[name][layer]).double() for shard in range(shards))
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert all(torch.equal(it[name, layer], total) for it in found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_the_layer_that_backward_met_first(tmp_path, value):
    totals = Accumulation(1, tmp_path / "partial.safetensors", SoloWorld(), {"neurons": [(3, 3)] * 3})

    def score(_shard, _counts):
        for lost in range(2):
            totals.add_to_matrix("neurons", lost, adding(torch.full((3, 3), value)))
        return {"loss": torch.zeros(1).double()}

    with pytest.raises(UserError, match=r"sums of neurons in layer 1 are NaN or infinite"):
        totals.add_round(score)


def test_what_is_resumed_outlives_its_file(tmp_path):
    """Whoever saves a later state removes it, perhaps on another host, and with it what a view has yet to read."""
    file = tmp_path / "partial.safetensors"
    add_rounds(file, 1)
    assert begun(file, SoloWorld()).next_shard == 1
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()

"""Sums over shards, on any number of ranks, after a death at any write, and after damage to a file."""

import pytest
import torch
from damage import DAMAGES, damage, nothing_reaches_the_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Ranks

from hfprune_dist.checkpoints import tensor_files
from hfprune_dist.core.criterion import losses_of
from hfprune_dist.methods import CRITERIA
from hfprune_dist.scoring import shard_sums
from hfprune_dist.scoring.shard_sums import Accumulation, KindSizes, SumsOfShard


@pytest.fixture(scope="module", autouse=True)
def fast():
    with nothing_reaches_the_disk():
        yield


# A pass that saves everything a pass can save.
FULL = [CRITERIA[name] for name in ("activation_l1", "entropy", "surgeon", "weight_taylor")]
LAYERS, HIDDEN, SHARDS = 2, 3, 5
SHAPES = {
    "neurons": KindSizes((6,) * LAYERS, 1, HIDDEN),
    "kv_groups": KindSizes((2,) * LAYERS, 4, HIDDEN),
}
WEIGHTS = {"up": [(6, HIDDEN)] * LAYERS}


def full_shard(number):
    generator = torch.Generator().manual_seed(number)
    kinds = {
        kind: {it.name: torch.rand(sizes.of_sums(it), generator=generator).double() for it in FULL if it.reduce}
        for kind, sizes in SHAPES.items()
    }
    return SumsOfShard(kinds, {loss.name: 1.5 + number for loss in losses_of(FULL)})


def begun(file, world):
    return Accumulation(FULL, SHAPES, SHARDS, file, world, weights=WEIGHTS)


def add_rounds(file, rounds=SHARDS, world=None):
    """Add up to so many rounds; return the totals, and the number of shards after each."""
    totals, where = begun(file, world or SoloWorld()), []
    while not totals.is_complete and len(where) < rounds:
        for sums in (totals.curvature, totals.gradients):  # as a backward of this round's shard does
            generator = torch.Generator().manual_seed(totals.own_shard)
            for layer in reversed(range(LAYERS)):
                for name, of_layers in sums.sizes.items():
                    one = torch.randn(of_layers[layer], generator=generator)
                    sums.add(name, layer, one if totals.own_shard_counts else None)
        totals.add_round(full_shard(totals.own_shard))
        where.append(totals.next_shard)
    return totals, where


def assert_same(totals, expected):
    assert totals.losses == expected.losses and totals.next_shard == expected.next_shard
    for kind, of_kind in expected.kinds.items():
        assert all(torch.equal(totals.kinds[kind][name], it) for name, it in of_kind.items())
        for layer in range(LAYERS):
            torch.testing.assert_close(totals.mean_curvature(kind, layer, 1), expected.mean_curvature(kind, layer, 1))
    for layer in range(LAYERS):
        torch.testing.assert_close(totals.mean_gradient("up", layer, 1), expected.mean_gradient("up", layer, 1))


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return add_rounds(tmp_path_factory.mktemp("expected") / "partial.safetensors")[0]


@settings(max_examples=40)
@given(
    rounds=st.integers(1, SHARDS),
    damaged=st.sampled_from((None, "curvature/{}/kv_groups-1.safetensors", "gradients/{}/up-0.safetensors")),
    how=DAMAGES | st.none(),
)
def test_a_damaged_or_missing_file_is_set_aside_and_the_pass_begins_anew(
    tmp_path_factory, expected, rounds, damaged, how
):
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
    assert (folder / "partial.safetensors.damaged-1").is_file() or (victim == file and how is None)


class Death(BaseException):
    """The end of a process at a write."""


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
    for dies_at in range(1, SHARDS * (3 * LAYERS + 1) + 1):
        writes[0], file = 0, tmp_path / str(dies_at) / "partial.safetensors"
        with pytest.raises(Death):
            add_rounds(file)
        assert_same(add_rounds(file)[0], expected)
        # A death when the pass was complete leaves the state before it, until the stage is done.
        assert {it.name for it in (file.parent / "curvature").iterdir()} - {str(SHARDS - 1)} == {str(SHARDS)}


@settings(max_examples=40)
@given(size=st.integers(1, 5), later=st.integers(1, 5), rounds=st.integers(1, SHARDS), ends=st.booleans())
def test_where_ranks_own_much_not_every_round_is_saved_and_nothing_is_lost_at_an_end_that_is_asked_for(
    tmp_path_factory, expected, size, later, rounds, ends
):
    file = tmp_path_factory.mktemp("seldom") / "partial.safetensors"
    owned = 8 * -(-LAYERS // size) * (2 * HIDDEN**2 + 6 * HIDDEN)

    def go_on(world, rounds):
        begun_at = begun(file, world).next_shard
        totals, where = add_rounds(file, rounds, world)
        if ends:
            totals.save()
        return totals, begun_at, where

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_sums, "BYTES_SAVED_A_ROUND", -(-owned // 2))
        (_, begun_at, where), *_ = Ranks(size).run(lambda world: go_on(world, rounds))
        assert begun_at == 0
        saved = where[-1] if ends or where[-1] == SHARDS else [0, *where][len(where) // 2 * 2]
        for totals, begun_at, _ in Ranks(later).run(lambda world: go_on(world, SHARDS)):
            assert begun_at == saved
            assert_same(totals, expected)
    assert sorted(it.name for it in (file.parent / "curvature").iterdir()) == [str(SHARDS)]

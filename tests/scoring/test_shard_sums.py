"""Sums over shards, and what a damaged file leaves of them."""

import pytest
import torch
from damage import DAMAGES, damage, nothing_reaches_the_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Ranks

from hfprune_dist.checkpoints import tensor_files
from hfprune_dist.checkpoints.tensor_files import load_tensors, save_tensors
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.unit_sums import KindSums
from hfprune_dist.scoring import shard_sums
from hfprune_dist.scoring.kind_totals import KindSizes
from hfprune_dist.scoring.shard_scorer import SumsOfShard
from hfprune_dist.scoring.shard_sums import Accumulation


@pytest.fixture(scope="module", autouse=True)
def fast():
    with nothing_reaches_the_disk():
        yield


# A pass that saves everything a pass can save.
FULL = [CRITERIA[name] for name in ("activation", "entropy", "surgeon")]
LAYERS, HIDDEN, SHARDS = 2, 3, 5
NEURONS, GROUPS = KindSizes((6,) * LAYERS, 1, HIDDEN), KindSizes((2,) * LAYERS, 4, HIDDEN)
SHAPES = {"neurons": NEURONS, "kv_groups": GROUPS}


def kind_of_shard(shape, generator):
    return KindSums({it.name: torch.rand(shape.of_sums(it), generator=generator, dtype=torch.float64) for it in FULL})


def full_shard(number, shapes):
    generator = torch.Generator().manual_seed(number)
    kinds = {kind: kind_of_shard(shape, generator) for kind, shape in shapes.items()}
    return SumsOfShard(kinds, {"entropy": 1.5 + number, "random_signs": 0.25 * number})


def add_rounds(file, rounds=SHARDS, shapes=SHAPES):
    totals = Accumulation(FULL, shapes, SHARDS, file, SoloWorld())
    while not totals.is_complete and totals.next_shard < rounds:
        show_gradients(totals)
        totals.add_round(full_shard(totals.own_shard, shapes))
    return totals


def show_gradients(totals):
    """Do as a backward of this round's shard of one micro-batch does; neurons' gradients ignore other kinds."""
    for kind, see in totals.curvature.seeing(counts=totals.own_shard_counts).items():
        generator = torch.Generator().manual_seed(2 * totals.own_shard + (kind != "neurons"))
        for layer in reversed(range(LAYERS)):
            see(layer, torch.randn(4, HIDDEN, generator=generator))


def assert_same(totals, expected):
    assert totals.losses == expected.losses
    assert totals.kinds.keys() == expected.kinds.keys()
    for kind in totals.kinds:
        assert_same_kind(kind, totals, expected)


def assert_same_kind(kind, totals, expected):
    sums, expected_sums = totals.kinds[kind].sums, expected.kinds[kind].sums
    assert sums.keys() == expected_sums.keys()
    assert all(torch.equal(sums[name], it) for name, it in expected_sums.items())
    for layer in range(LAYERS):
        torch.testing.assert_close(totals.mean_curvature(kind, layer, 1), expected.mean_curvature(kind, layer, 1))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rounds=st.integers(1, SHARDS),
    damaged=st.sampled_from(
        (None, None, *(f"{kind}-{layer}.safetensors" for kind in SHAPES for layer in range(LAYERS)))
    ),
    how=DAMAGES,
)
def test_a_damaged_file_is_set_aside_and_the_pass_begins_anew(tmp_path_factory, rounds, damaged, how):
    """It may be the file that says where the pass is, or one that goes with it."""
    expected = add_rounds(tmp_path_factory.mktemp("expected") / "partial.safetensors")
    folder = tmp_path_factory.mktemp("damaged")
    file = folder / "partial.safetensors"
    add_rounds(file, rounds)
    if damage(file if damaged is None else folder / "curvature" / str(rounds) / damaged, *how):
        assert_same(add_rounds(file), expected)
        assert (folder / "partial.safetensors.damaged-1").is_file()


class Death(BaseException):
    """The end of a process at a write."""


@pytest.mark.parametrize("moment", ["before it has its name", "once it has its name"])
def test_death_at_any_write_of_any_round_ends_with_the_same_sums(tmp_path, monkeypatch, moment):
    expected, publish = add_rounds(tmp_path / "expected" / "partial.safetensors"), tensor_files.publish
    writes = [0]

    def counted(draft, file):
        writes[0] += 1
        if writes[0] == dies_at and moment == "before it has its name":
            raise Death
        publish(draft, file)
        if writes[0] == dies_at:
            raise Death

    monkeypatch.setattr(tensor_files, "publish", counted)
    for dies_at in range(1, SHARDS * (2 * LAYERS + 1) + 1):
        writes[0], file = 0, tmp_path / str(dies_at) / "partial.safetensors"
        with pytest.raises(Death):
            add_rounds(file)
        assert_same(add_rounds(file), expected)
        # A death when the pass was complete leaves the state before it, until the stage is done.
        assert {it.name for it in (file.parent / "curvature").iterdir()} - {str(SHARDS - 1)} == {str(SHARDS)}


@pytest.mark.parametrize("replaced", [None, {"total": torch.zeros(HIDDEN, HIDDEN)}, {"sum": torch.zeros(2)}])
def test_a_pass_whose_curvature_is_missing_or_of_another_begins_anew(tmp_path, capsys, replaced):
    file, lost = tmp_path / "partial.safetensors", tmp_path / "curvature" / "3" / "kv_groups-1.safetensors"
    add_rounds(file, 3)
    lost.unlink()
    if replaced:
        save_tensors(replaced, lost)
    assert_same(add_rounds(file), add_rounds(tmp_path / "other" / "partial.safetensors"))
    assert "goes with kv_groups-1.safetensors" in capsys.readouterr().out


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 5),
    later=st.integers(1, 5),
    rounds=st.integers(1, SHARDS),
    ends=st.booleans(),
)
def test_where_ranks_own_much_not_every_round_is_saved_and_nothing_is_lost_at_an_end_that_is_asked_for(
    tmp_path_factory, size, later, rounds, ends
):
    expected = add_rounds(tmp_path_factory.mktemp("expected") / "partial.safetensors")
    file = tmp_path_factory.mktemp("seldom") / "partial.safetensors"
    owned = 2 * -(-LAYERS // size) * HIDDEN**2 * 8

    def go_on(world, rounds):
        totals = Accumulation(FULL, SHAPES, SHARDS, file, world)
        where, begun_at = [], totals.next_shard
        while not totals.is_complete and len(where) < rounds:
            show_gradients(totals)
            totals.add_round(full_shard(totals.own_shard, SHAPES))
            where.append(totals.next_shard)
        if ends:
            totals.save()
        return totals, begun_at, where

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_sums, "BYTES_SAVED_A_ROUND", -(-owned // 2))
        (_, begun_at, where), *_ = Ranks(size).run(lambda world: go_on(world, rounds))
        assert begun_at == 0
        saved = where[-1] if ends or where[-1] == expected.next_shard else [0, *where][len(where) // 2 * 2]
        ranks = Ranks(later)
        for totals, begun_at, _ in ranks.run(lambda world: go_on(world, SHARDS)):
            assert begun_at == saved
            assert_same(totals, expected)
    assert sorted(it.name for it in (file.parent / "curvature").iterdir()) == [str(expected.next_shard)]


@pytest.mark.parametrize(
    "other",
    [
        {"criteria": FULL[:2]},
        {"criteria": [CRITERIA["activation"], CRITERIA["fisher"], CRITERIA["surgeon"]]},
        {"shapes": {"neurons": NEURONS}},
        {"shapes": {"neurons": GROUPS, "kv_groups": NEURONS}},
        {"shapes": SHAPES | {"kv_groups": GROUPS._replace(channels_per_unit=3)}},
        *(
            {"shapes": SHAPES | {"neurons": NEURONS._replace(**changed)}}
            for changed in ({"counts": (6,) * 9}, {"counts": (9,) * LAYERS}, {"hidden_size": 9})
        ),
        {"shards": 3},
    ],
)
def test_a_file_of_another_pass_is_set_aside(tmp_path, capsys, other):
    """It was saved by the pass under test, and is found by one with other criteria, another model or fewer shards."""
    file = tmp_path / "partial.safetensors"
    add_rounds(file, 4)
    totals = Accumulation(
        other.get("criteria", FULL),
        other.get("shapes", SHAPES),
        other.get("shards", SHARDS),
        file,
        SoloWorld(),
    )
    assert totals.next_shard == 0 and not any(it.any() for it in totals.kinds["neurons"].sums.values())
    assert not file.exists()
    assert "is of another pass" in capsys.readouterr().out
    assert_same(add_rounds(file), add_rounds(tmp_path / "expected" / "partial.safetensors"))


def test_a_whole_file_is_taken_up(tmp_path, capsys):
    file = tmp_path / "partial.safetensors"
    add_rounds(file, 3)
    assert Accumulation(FULL, SHAPES, SHARDS, file, SoloWorld()).next_shard == 3
    assert_same(add_rounds(file), add_rounds(tmp_path / "expected" / "partial.safetensors"))
    assert not capsys.readouterr().out


def test_of_neurons_alone_the_file_says_nothing_of_kinds(tmp_path):
    file = tmp_path / "partial.safetensors"
    totals = add_rounds(file, 3, {"neurons": NEURONS})
    saved, _ = load_tensors(file)
    sums = {f"sums.{it.name}": (torch.float64, (LAYERS, 6)) for it in FULL}
    losses = {f"loss.{name}": (torch.float64, ()) for name in ("entropy", "random_signs")}
    rest = {"next_shard": (torch.int64, ())}
    assert {name: (it.dtype, tuple(it.shape)) for name, it in saved.items()} == sums | losses | rest
    for criterion in FULL:
        assert torch.equal(saved[f"sums.{criterion.name}"], totals.kinds["neurons"].sums[criterion.name])


def test_other_kinds_change_no_sums_of_neurons(tmp_path):
    alone = add_rounds(tmp_path / "alone" / "partial.safetensors", shapes={"neurons": NEURONS})
    beside = add_rounds(tmp_path / "beside" / "partial.safetensors")
    assert_same_kind("neurons", beside, alone)

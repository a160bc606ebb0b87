"""Sums over shards: those whose running total is rounded, and what a file that was damaged leaves of any."""

import pytest
import torch
from damage import DAMAGES, damage, nothing_reaches_the_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld

from hfprune_dist.checkpoints.tensor_files import load_tensors, save_tensors
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.scoring.shard_scorer import Sums
from hfprune_dist.scoring.shard_sums import Accumulation

CHOSEN = [CRITERIA["entropy"], CRITERIA["entropy_bfloat16"]]


@pytest.fixture(scope="module", autouse=True)
def fast():
    with nothing_reaches_the_disk():
        yield


def shard_of(terms):
    """What a shard of micro-batches with these terms of entropy reports: rows of float64 sums, and rounded terms."""
    exact = sum(torch.full((1, 1), term, dtype=torch.float64) for term in terms)
    rounded = [torch.full((1, 1, 1), term) for term in terms]
    return Sums(torch.stack([exact, torch.zeros_like(exact)]), rounded, torch.zeros(0), {"entropy": 0.0})


def accumulate(folder, shards, restart=False):
    file, world = folder / "partial.safetensors", SoloWorld()
    totals = Accumulation(CHOSEN, (1, 1, 1), len(shards), file, world)
    while not totals.is_complete:
        totals.add_round(shard_of(shards[totals.mine]))
        if restart:
            totals = Accumulation(CHOSEN, (1, 1, 1), len(shards), file, world)
    return totals.sums_KLU[:, 0, 0].tolist()


@pytest.mark.parametrize("restart", [False, True])
def test_what_adds_less_than_a_256th_vanishes(tmp_path, restart):
    shards = [[1.0, 1.0]] * 300
    assert accumulate(tmp_path, shards, restart) == [600.0, 256.0]


def test_rounding_does_not_depend_on_how_micro_batches_are_cut_into_shards(tmp_path):
    terms = (torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.5).tolist()
    for name in ("ones", "fours"):
        (tmp_path / name).mkdir()
    ones = accumulate(tmp_path / "ones", [[term] for term in terms])
    fours = accumulate(tmp_path / "fours", [terms[start : start + 4] for start in range(0, 12, 4)])
    assert ones[1] == fours[1] != ones[0]


# A pass that saves everything that a pass can.
FULL = [CRITERIA[name] for name in ("activation", "entropy_bfloat16", "surgeon")]
LAYERS, NEURONS, HIDDEN, SHARDS = 2, 6, 3, 5


def full_shard(number):
    generator = torch.Generator().manual_seed(number)
    gradients = torch.randn(LAYERS, 4, HIDDEN, generator=generator)
    return Sums(
        torch.rand(3, LAYERS, NEURONS, generator=generator, dtype=torch.float64),
        [torch.rand(1, LAYERS, NEURONS, generator=generator) for _ in range(2)],
        gradients.transpose(1, 2) @ gradients,
        {"entropy": 1.5 + number, "random_signs": 0.25 * number},
    )


def add_rounds(file, rounds=SHARDS, criteria=FULL, shape=(LAYERS, NEURONS, HIDDEN), shards=SHARDS):
    totals = Accumulation(criteria, shape, shards, file, SoloWorld())
    while not totals.is_complete and totals.next_shard < rounds:
        totals.add_round(full_shard(totals.mine))
    return totals


def assert_same(totals, expected):
    assert torch.equal(totals.sums_KLU, expected.sums_KLU)
    assert totals.losses == expected.losses and totals.curve == expected.curve
    for layer in range(LAYERS):
        assert torch.equal(totals.mean_curvature(layer, 1), expected.mean_curvature(layer, 1))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rounds=st.integers(1, SHARDS), how=DAMAGES)
def test_a_damaged_file_is_set_aside_and_the_pass_begins_anew(tmp_path_factory, rounds, how):
    folder = tmp_path_factory.mktemp("damaged")
    expected = add_rounds(folder / "expected.safetensors")
    file = folder / "partial.safetensors"
    add_rounds(file, rounds)
    if damage(file, *how):
        assert_same(add_rounds(file), expected)
        assert (folder / "partial.safetensors.damaged-1").is_file()


@pytest.mark.parametrize(
    "other",
    [
        {"criteria": FULL[:2]},
        {"criteria": [CRITERIA["activation"], CRITERIA["entropy"], CRITERIA["surgeon"]]},
        {"shape": (LAYERS, NEURONS, HIDDEN + 1)},
        {"shape": (LAYERS, NEURONS + 1, HIDDEN)},
        {"shape": (LAYERS + 1, NEURONS, HIDDEN)},
        {"shards": 3},
    ],
)
def test_a_file_of_another_pass_is_set_aside(tmp_path, capsys, other):
    """Saved by the pass under test, found by one that has other criteria, another model or fewer shards."""
    file = tmp_path / "partial.safetensors"
    add_rounds(file, 4)
    totals = Accumulation(
        other.get("criteria", FULL),
        other.get("shape", (LAYERS, NEURONS, HIDDEN)),
        other.get("shards", SHARDS),
        file,
        SoloWorld(),
    )
    assert totals.next_shard == 0 and not totals.sums_KLU.any() and not file.exists()
    assert "is of another pass" in capsys.readouterr().out
    assert_same(add_rounds(file), add_rounds(tmp_path / "expected.safetensors"))


@pytest.mark.parametrize("points", [torch.ones(3), torch.ones(2, 5), torch.tensor([[2.0, 9.0, 0.5, 1.0]])])
def test_a_curve_that_is_none_is_of_another_pass(tmp_path, points):
    file = tmp_path / "partial.safetensors"
    add_rounds(file, 2)
    saved, _ = load_tensors(file)
    save_tensors({**saved, "curve": points.double()}, file)
    assert_same(add_rounds(file), add_rounds(tmp_path / "expected.safetensors"))
    assert (tmp_path / "partial.safetensors.damaged-1").is_file()


def test_a_whole_file_is_taken_up(tmp_path, capsys):
    file = tmp_path / "partial.safetensors"
    add_rounds(file, 3)
    assert Accumulation(FULL, (LAYERS, NEURONS, HIDDEN), SHARDS, file, SoloWorld()).next_shard == 3
    assert_same(add_rounds(file), add_rounds(tmp_path / "expected.safetensors"))
    assert not capsys.readouterr().out

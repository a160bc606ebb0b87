"""Sums whose running total is rounded, as those of code that adds up in bfloat16."""

import pytest
import torch
from ranks import SoloWorld

from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.parallel.accumulation import Accumulation
from hfprune_dist.parallel.calibration import Sums

CHOSEN = [CRITERIA["entropy"], CRITERIA["entropy_bfloat16"]]


def shard_of(terms):
    """What a shard of micro-batches with these terms of entropy reports: rows of float64 sums, and rounded terms."""
    exact = sum(torch.full((1, 1), term, dtype=torch.float64) for term in terms)
    rounded = [torch.full((1, 1, 1), term) for term in terms]
    return Sums(torch.stack([exact, torch.zeros_like(exact)]), rounded, torch.zeros(0), {"entropy": 0.0})


def accumulate(folder, shards, restart=False):
    file, world = folder / "partial.safetensors", SoloWorld()
    totals = Accumulation(CHOSEN, (1, 1), len(shards), file, world)
    while not totals.is_complete:
        totals.add_round(shard_of(shards[totals.mine]))
        if restart:
            totals = Accumulation(CHOSEN, (1, 1), len(shards), file, world)
    return totals.sums_KLD[:, 0, 0].tolist()


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

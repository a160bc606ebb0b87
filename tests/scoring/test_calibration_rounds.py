"""The calibration pass on any number of ranks: in step, with the bits of one rank, and after a death at any point."""

import math
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from damage import nothing_reaches_the_disk
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from worlds import BACKWARD, FORWARD, Death, Ranks, without_deepspeed

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.methods import CRITERIA
from hfprune_dist.stages import importance
from hfprune_dist.store.heartbeat import Progress

TOKENS, UNKNOWN = 6, 250
SMALLEST = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
# Only the default; with a sum of activations and another loss; and gradients of weights, with products of them as well.
CHOICES = (("surgeon",), ("activation_l1", "entropy", "surgeon"), ("entropy", "weight_taylor", "coupled_taylor"))


class Case(NamedTuple):
    """A pass: windows, micro-batches per shard, windows per micro-batch, which of ``CHOICES``, and whether KV groups
    are scored as well.
    """

    samples: int
    shard_size: int
    micro_batch_size: int
    choice: int
    groups: bool = False

    @property
    def structures(self):
        return ["neurons", "kv_groups"] if self.groups else ["neurons"]

    @property
    def shards(self):
        """Return the number of micro-batches in every shard."""
        micro_batches = math.ceil(self.samples / self.micro_batch_size)
        return [min(self.shard_size, micro_batches - start) for start in range(0, micro_batches, self.shard_size)]

    def tokens(self, shards_done):
        return min(shards_done * self.shard_size * self.micro_batch_size, self.samples) * TOKENS

    def forwards(self, shards_done, ranks):
        """Return each rank's forwards: as many per round as the longest shard has."""
        return sum(self.shards[first] for first in range(0, shards_done, ranks))

    def backwards(self, forwards):
        """Per forward, one for each loss."""
        return (forwards, 2 * forwards, 2 * forwards)[self.choice]


CASES = st.builds(
    Case,
    samples=st.integers(1, 10),
    shard_size=st.integers(1, 4),
    micro_batch_size=st.integers(1, 3),
    choice=st.sampled_from((0, 0, 0, 0, 1, 2)),
    groups=st.sampled_from((False, False, False, False, True)),
)
SIZES = st.integers(1, 5)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch, nothing_reaches_the_disk():
        yield patch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a model for which one word is not a number."""
    folder = save_tiny(tmp_path_factory.mktemp("rounds") / "model", **SMALLEST)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][UNKNOWN] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def calibrate(checkpoint, patch):
    """Return a function that runs a pass in a work folder and returns what it adds up to on every rank.

    A window may have the word that is not a number.
    """
    without_deepspeed(patch)
    known_ST = torch.randint(3, UNKNOWN, (64, TOKENS), generator=torch.Generator().manual_seed(0))

    def calibrate(case, ranks, work, unknown_in=None):
        windows_ST = known_ST.clone()
        if unknown_in is not None:
            windows_ST[unknown_in, TOKENS // 2] = UNKNOWN
        keys = ("micro_batch_size", "shard_size")
        sizes = {key: getattr(case, key) for key in keys}
        calibration = SimpleNamespace(**sizes, samples=case.samples, sequence_length=TOKENS)
        names = CHOICES[case.choice]
        params = SimpleNamespace(
            criteria=names, dtype="float32", seed=3, calibration=calibration, structures=case.structures
        )

        def accumulate(world):
            context = SimpleNamespace(
                params=params,
                runtime=SimpleNamespace(activation_checkpointing=False, sharding="auto"),
                world=world,
                work=work,
                progress=Progress(None),
                interruption=Interruption(),
            )
            criteria = [CRITERIA[name] for name in names]
            return importance._accumulate(context, checkpoint, windows_ST[: case.samples], criteria)

        return ranks.run(accumulate)

    return calibrate


@pytest.fixture(scope="module")
def on_one_rank(calibrate, tmp_path_factory):
    @cache
    def on_one_rank(case):
        ranks = Ranks(1)
        (totals,) = calibrate(case, ranks, tmp_path_factory.mktemp("one"))
        if case.groups:
            assert_same(on_one_rank(case._replace(groups=False)), totals, case.tokens(totals.next_shard))
        assert ranks.counts()[FORWARD] == case.forwards(totals.next_shard, 1), "one rank keeps step with nobody"
        return totals

    return on_one_rank


def assert_same(totals, expected, tokens):
    assert totals.next_shard == expected.next_shard and totals.is_complete
    assert totals.losses == expected.losses
    for kind, of_kind in totals.kinds.items():
        for name, sums in expected.kinds[kind].items():
            assert torch.equal(of_kind[name], sums), (kind, name)
        for layer in range(2) if totals.curvature else ():
            curvature = expected.mean_curvature(kind, layer, tokens)
            torch.testing.assert_close(totals.mean_curvature(kind, layer, tokens), curvature, rtol=1e-5, atol=1e-7)
    for weight in totals.gradients.sizes:
        for layer in range(2):
            gradient = expected.mean_gradient(weight, layer, tokens)
            torch.testing.assert_close(totals.mean_gradient(weight, layer, tokens), gradient, rtol=1e-5, atol=1e-7)


# The victim is numbered among the ranks, and the collective before which it dies among the victim's own.
@settings(max_examples=40, deadline=None, derandomize=True)
@example(case=Case(6, 4, 1, 1), size=2, later=3, dies_at=0.9, victim=0)
@example(case=Case(62, 4, 1, 0), size=4, later=3, dies_at=0.5, victim=1)
@example(case=Case(1, 1, 1, 1), size=1, later=1, dies_at=0.0, victim=0)
@example(case=Case(1, 1, 1, 0), size=5, later=2, dies_at=0.99, victim=3)
@example(case=Case(13, 4, 2, 1), size=3, later=1, dies_at=0.7, victim=2)
@example(case=Case(3, 1, 1, 1, groups=True), size=5, later=2, dies_at=0.8, victim=0)
@example(case=Case(9, 2, 1, 2, groups=True), size=3, later=2, dies_at=0.7, victim=1)
@example(case=Case(9, 2, 2, 2), size=2, later=3, dies_at=0.5, victim=0)
@given(case=CASES, size=SIZES, later=SIZES, dies_at=st.floats(0, 0.999), victim=st.integers(0, 4))
def test_all_ranks_keep_step_and_have_the_sums_of_one(
    calibrate, on_one_rank, tmp_path_factory, case, size, later, dies_at, victim
):
    expected = on_one_rank(case)
    tokens = case.tokens(expected.next_shard)

    ranks = Ranks(size)
    for totals in calibrate(case, ranks, tmp_path_factory.mktemp("many")):
        assert_same(totals, expected, tokens)
    counts = ranks.counts()
    assert all(ranks.counts(rank) == counts for rank in range(size))
    assert counts[FORWARD] == case.forwards(expected.next_shard, size)
    assert counts[BACKWARD] == case.backwards(counts[FORWARD])

    victim %= size
    mortal = Ranks(size, deaths={victim: math.floor(dies_at * len(ranks.logs[victim]))})
    work = tmp_path_factory.mktemp("killed")
    with pytest.raises(Death):
        calibrate(case, mortal, work)
    for totals in calibrate(case, Ranks(later), work):
        assert_same(totals, expected, tokens)


@pytest.mark.parametrize("choice", range(len(CHOICES)))
@pytest.mark.parametrize("window", [0, 5])
def test_what_is_not_finite_in_one_ranks_windows_is_told_with_their_number(calibrate, tmp_path, window, choice):
    message = f"^importance, calibration windows from number {window} on: .* are NaN.*set importance.dtype=float32"
    with pytest.raises(UserError, match=message):
        calibrate(Case(7, 2, 1, choice), Ranks(2), tmp_path, unknown_in=window)

"""The calibration pass on any number of ranks: in step, with the bits of one rank, and after a death at any point."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from damage import nothing_reaches_the_disk
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from worlds import BACKWARD, FORWARD, Death, Ranks, without_deepspeed

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.texts import CalibrationConfig
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.importance import ImportanceParameters
from hfprune_dist.methods import CRITERIA
from hfprune_dist.stages import importance
from hfprune_dist.store.heartbeat import Progress

TOKENS, UNKNOWN = 8, 250
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
        """Return each rank's forwards: two that check what the model does to logits, then as many per round as the
        longest shard has.
        """
        return 2 + sum(self.shards[first] for first in range(0, shards_done, ranks))

    def backwards(self, forwards):
        """Per forward, one for each loss."""
        return (forwards - 2) * (1, 2, 2)[self.choice]


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
        work.mkdir(exist_ok=True)
        windows_ST = known_ST.clone()
        if unknown_in is not None:
            windows_ST[unknown_in, TOKENS // 2] = UNKNOWN
        keys = ("samples", "micro_batch_size", "shard_size")
        calibration = CalibrationConfig(sequence_length=TOKENS, **{key: getattr(case, key) for key in keys})
        names = [*CHOICES[case.choice]]
        settings = {"criteria": names, "dtype": "float32", "add_bos_token": True, "seed": 3}
        params = ImportanceParameters(calibration=calibration, structures=case.structures, **settings)

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
            windows = windows_ST[: case.samples]
            return importance._accumulate(context, checkpoint, windows, criteria, case.micro_batch_size)

        return ranks.run(accumulate)

    return calibrate


def assert_same(totals, expected, tokens):
    assert totals.next_shard == expected.next_shard and totals.is_complete
    assert all(torch.equal(expected.sums[name], sum_N) for name, sum_N in totals.sums.items())
    for name in totals.matrices:
        for layer in range(2):
            mean = expected.matrix(name, layer) / tokens
            torch.testing.assert_close(totals.matrix(name, layer) / tokens, mean, rtol=1e-5, atol=1e-7)


# The victim is numbered among the ranks, and the collective before which it dies among the victim's own.
@pytest.mark.parametrize(
    ("case", "size", "later", "dies_at", "victim"),
    [
        (Case(30, 4, 1, 0), 4, 3, 0.5, 1),
        (Case(1, 1, 1, 1), 1, 1, 0.0, 0),
        (Case(1, 1, 1, 0), 5, 2, 0.99, 3),
        (Case(13, 4, 2, 1, groups=True), 3, 1, 0.7, 2),
        (Case(9, 2, 1, 2, groups=True), 3, 2, 0.7, 1),
        (Case(9, 2, 2, 2), 2, 3, 0.5, 0),
    ],
    ids=str,
)
def test_all_ranks_keep_step_and_have_the_sums_of_one(calibrate, tmp_path, case, size, later, dies_at, victim):
    one = Ranks(1)
    (expected,) = calibrate(case, one, tmp_path / "one")
    tokens = case.tokens(expected.next_shard)
    if case.groups:
        (alone,) = calibrate(case._replace(groups=False), Ranks(1), tmp_path / "alone")
        assert_same(alone, expected, tokens)
    assert one.counts()[FORWARD] == case.forwards(expected.next_shard, 1), "one rank keeps step with nobody"

    ranks = Ranks(size)
    for totals in calibrate(case, ranks, tmp_path / "many"):
        assert_same(totals, expected, tokens)
    counts = ranks.counts()
    assert all(ranks.counts(rank) == counts for rank in range(size))
    assert counts[FORWARD] == case.forwards(expected.next_shard, size)
    assert counts[BACKWARD] == case.backwards(counts[FORWARD])

    mortal = Ranks(size, deaths={victim: math.floor(dies_at * len(ranks.logs[victim]))})
    with pytest.raises(Death):
        calibrate(case, mortal, tmp_path / "killed")
    for totals in calibrate(case, Ranks(later), tmp_path / "killed"):
        assert_same(totals, expected, tokens)


@pytest.mark.parametrize(("choice", "window"), [(0, 5), (1, 0), (2, 5)])
def test_what_is_not_finite_in_one_ranks_windows_is_told_with_their_number(calibrate, tmp_path, window, choice):
    message = f"^importance, calibration windows from number {window} on: .* are NaN.*set importance.dtype=float32"
    with pytest.raises(UserError, match=message):
        calibrate(Case(7, 2, 1, choice), Ranks(2), tmp_path, unknown_in=window)

"""The calibration pass over all shards of the windows, on all ranks; sums are saved between rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.scoring.shard_scorer import ShardScorer
from hfprune_dist.scoring.shard_sums import Accumulation

# A shard: the numbers of the windows in each of its micro-batches.
Shard = Sequence[range]


def cut_into_shards(windows: int, micro_batch_size: int, shard_size: int) -> list[Shard]:
    """Split windows into micro-batches and these into shards; only the last micro-batch and shard may be smaller."""
    starts = range(0, windows, micro_batch_size)
    micro_batches = [range(start, min(start + micro_batch_size, windows)) for start in starts]
    return [micro_batches[start : start + shard_size] for start in range(0, len(micro_batches), shard_size)]


def run_pass(
    shards: Sequence[Shard],
    totals: Accumulation,
    load: Callable[[], ShardScorer],
    *,
    before_round: Callable[[int], None],
    after_round: Callable[[], None],
) -> None:
    """Score the remaining shards, one round of consecutive shards on all ranks at a time.

    Args:
        totals: sums over the shards so far.
        load: loads the model; not called if nothing is left to score.
        before_round: called with the number of shards that are done.
        after_round: called after a round has been added; may end the pass by raising ``Interrupted``.

    Raises:
        UserError: if activations or gradients are NaN or infinite.
    """
    if totals.is_complete:
        return
    scorer = load()
    while not totals.is_complete:
        before_round(totals.next_shard)
        longest = shards[totals.next_shard]  # only the very last shard is shorter
        totals.add_round(scorer.score(shards[totals.own_shard], len(longest), counts=totals.own_shard_counts))
        try:
            after_round()
        except Interrupted:
            totals.save()
            raise
    scorer.release()

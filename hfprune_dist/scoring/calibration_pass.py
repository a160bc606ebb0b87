"""The calibration pass over all shards of the windows, on all ranks; sums are saved between rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.scoring.shard_scorer import ShardScorer, SumsOfShard
from hfprune_dist.scoring.shard_sums import Accumulation

# A shard: the numbers of the windows in each of its micro-batches.
Shard = Sequence[range]


def cut_into_shards(windows: int, micro_batch_size: int, shard_size: int) -> list[Shard]:
    """Split windows into micro-batches and these into shards; only the last micro-batch and shard may be smaller."""
    starts = range(0, windows, micro_batch_size)
    micro_batches = [range(start, min(start + micro_batch_size, windows)) for start in starts]
    return [micro_batches[start : start + shard_size] for start in range(0, len(micro_batches), shard_size)]


class CalibrationPass:
    """One rank's part of what is left of a pass; all ranks run it together, one round of consecutive shards at a time.

    Args:
        totals: sums over the shards so far.
        load: loads the model; not called if nothing is left to score.
    """

    def __init__(self, shards: Sequence[Shard], totals: Accumulation, load: Callable[[], ShardScorer]) -> None:
        self._shards = shards
        self._totals = totals
        self._load = load

    def run(
        self,
        before_round: Callable[[int], None],
        after_scoring: Callable[[], None],
        after_round: Callable[[], None],
    ) -> None:
        """Score the remaining shards.

        Args:
            before_round: called with the number of shards that are done.
            after_scoring: called after a round has been scored, before its sums are added and perhaps saved.
            after_round: called after a round has been added; may end the pass by raising ``Interrupted``.

        Raises:
            UserError: if activations or gradients are NaN or infinite.
        """
        totals = self._totals
        if totals.is_complete:
            return
        scorer = self._load()
        while not totals.is_complete:
            before_round(totals.next_shard)
            sums = self._score_round(scorer)
            after_scoring()
            totals.add_round(sums)
            try:
                after_round()
            except Interrupted:
                totals.save()
                raise
        scorer.release()

    def _score_round(self, scorer: ShardScorer) -> SumsOfShard:
        totals = self._totals
        return scorer.score(self._shards[totals.own_shard], self._most_forwards(), counts=totals.own_shard_counts)

    def _most_forwards(self) -> int:
        """Number of micro-batches in the round's longest shard: its first, since only the very last one is shorter."""
        return len(self._shards[self._totals.next_shard])

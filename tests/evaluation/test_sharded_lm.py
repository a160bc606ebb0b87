"""How the requests of a task are cut into chunks that ranks share."""

import pytest

from hfprune_dist.evaluation.sharded_lm import CHUNK_BATCHES, WANTED_CHUNKS, chunk_size

BATCH = 16


@pytest.mark.parametrize(
    ("method", "requests", "size"),
    [
        ("loglikelihood", 1, BATCH),
        ("loglikelihood", 240, BATCH),
        ("loglikelihood", WANTED_CHUNKS * BATCH, BATCH),
        ("generate_until", WANTED_CHUNKS * BATCH + 1, 2 * BATCH),
        ("loglikelihood", 1_000_000, CHUNK_BATCHES * BATCH),
        ("loglikelihood_rolling", 2, 1),
        ("loglikelihood_rolling", WANTED_CHUNKS + 1, 2),
        ("loglikelihood_rolling", 1_000_000, CHUNK_BATCHES * BATCH),
    ],
)
def test_small_tasks_make_many_chunks_and_large_ones_large_chunks(method, requests, size):
    assert chunk_size(method, requests, BATCH) == size

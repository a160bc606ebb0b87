import pytest
import torch

from hfprune_dist.core.blocks import ACCELERATOR_BYTES, CACHE_BYTES, row_blocks


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(1, 1), (1000, 4096), (3, 10**8), (0, 5)])
def test_portions_cover_every_row_once_within_their_bytes(device, shape):
    rows, columns = shape
    blocks = list(row_blocks(torch.empty(1, dtype=torch.bfloat16, device=device).expand(shape)))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    most = CACHE_BYTES * torch.get_num_threads() if device == "cpu" else ACCELERATOR_BYTES
    for block in blocks:
        assert block.stop == block.start + 1 or 4 * columns * (block.stop - block.start) <= most
    if rows == 1000:
        assert len(blocks) == -(-rows // (most // (4 * columns))), "as few as their bytes allow"

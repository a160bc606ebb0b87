"""Windows of the finals as costs count them, against the split that the stage makes."""

from typing import Any

import pytest
import torch

from hfprune_dist.planning.layer_pass_work import WindowCounts
from hfprune_dist.planning.search_work import Search
from hfprune_dist.stages import finals

NOTHING: Any = None


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 9, 15, 16, 17, 32, 33, 65, 127])
def test_windows_are_seen_and_judged_as_the_stage_splits_them(count, micro_batch):
    apart = finals.SplitWindows.apart(torch.zeros(count, 8, dtype=torch.int64), micro_batch)
    search = Search(NOTHING, NOTHING, NOTHING, NOTHING, WindowCounts(count, 8, micro_batch), {})
    assert search._seen.count == len(apart.seen_ST)
    assert search._judged.count == len(apart.judged)

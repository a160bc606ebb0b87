import time
from pathlib import Path

import pytest
import torch
from hfprune_launch.benchmark import isolated, measure
from hfprune_launch.benchmark.measure import paired_ratios


def test_ratios_are_medians_of_pairs_after_a_warm_up(monkeypatch):
    # Per round: a variant's seconds, then the unit's; the machine is ten times slower in the third round.
    seconds = iter([99.0, 1.0, 2.0, 1.0, 30.0, 10.0, 4.0, 1.0])
    monkeypatch.setattr(measure, "_seconds", lambda run: next(seconds))
    assert paired_ratios({"ours": lambda: None, "unit": lambda: None}, "unit", 3) == {"ours": 3.0, "unit": 1.0}


@pytest.mark.parametrize("peak", ["peak_bytes", "peak_anonymous_bytes"])
def test_memory_that_is_gone_at_the_end_is_seen(peak):
    # In a process of its own: what earlier tests left free in this one's heap would be taken again, and not be seen.
    environment = {**isolated.TIDY, "PYTHONPATH": str(Path(__file__).parent)}
    assert 2**25 < isolated.call(f"{Path(__file__).stem}:peak_of_a_block", {"peak": peak}, environment) < 2**27


def peak_of_a_block(peak: str) -> int:
    """In a separate process: the peak of 64 MiB that are in use for half a second."""

    def run() -> None:
        block = torch.ones(2**24)
        time.sleep(0.5)  # so that a busy machine, too, gets round to looking
        block.mul_(1.0)

    return getattr(measure, peak)(run)

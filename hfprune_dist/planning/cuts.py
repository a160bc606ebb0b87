"""Settings of the cuts in a plan."""

from __future__ import annotations

from hfprune_dist.config.method import Method
from hfprune_dist.config.parameters import PruneParameters
from hfprune_dist.config.schema import SweepConfig


def cut_parameters(config: SweepConfig, method: Method, ratio: float) -> PruneParameters:
    """The settings of one cut.

    Args:
        method: with numbers, as ``with_numbers`` returns it.
        ratio: share of the dense model's parameters that is gone after this cut.
    """
    # These run windows through the model again.
    runs_model = method.refit != "none" or method.allocation in ("plain", "searched", "low_rank")
    return PruneParameters(
        ratio=ratio,
        **method.of_one_cut(),
        dtype=config.importance.dtype if runs_model else None,
        micro_batch_size=config.calibration.micro_batch_size if runs_model else None,
    )

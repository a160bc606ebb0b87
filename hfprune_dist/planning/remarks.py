"""What is told of settings that are allowed, and do less than they say."""

from __future__ import annotations

from collections.abc import Mapping

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.planning.idle_settings import idle_settings
from hfprune_dist.planning.plan import NONE


def remarks_on_settings(config: SweepConfig, methods: Mapping[str, Method]) -> list[str]:
    """Return a sentence about each such setting.

    Raises:
        UserError: if a text has no files.
    """
    return [*idle_settings(config, methods), *_only_warm_up(config.recovery)]


def _only_warm_up(recovery: RecoveryConfig) -> list[str]:
    """A recovery that ends before its warm-up does; that of few epochs isn't known before pairs are tokenized."""
    steps, warmup_steps = recovery.max_steps, recovery.warmup_steps
    if recovery.method == NONE or steps is None or steps > warmup_steps:
        return []
    reached = (steps - 1) / warmup_steps
    return [
        f"recovery ends before its warm-up: max_steps is {steps} and warmup_steps {warmup_steps}, so the learning rate "
        f"comes to {reached:.0%} of learning_rate"
    ]

"""Warnings about settings that are valid but probably not what the user meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.training import DistillationConfig, RecoveryConfig
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.planning.idle_settings import idle_settings, texts_read
from hfprune_dist.planning.plan import NONE
from hfprune_dist.planning.rounds import round_ratios


def remarks_on_settings(config: SweepConfig, methods: Mapping[str, Method]) -> list[str]:
    """A sentence about each such setting.

    Raises:
        UserError: if a text has no files.
    """
    texts = texts_read(config, methods)
    distills = any(method.distill for method in methods.values())
    idle_rows = _idle_rows(config.distillation) if distills else []
    of_calibration = [*_seen_before(texts), *_rounds_on_all_samples(config, methods)]
    return [*idle_settings(config, methods), *of_calibration, *_only_warm_up(config.recovery), *idle_rows]


def _seen_before(texts: Mapping[str, TextSource]) -> Iterator[str]:
    """Texts for comparison that models are also pruned on."""
    calibration = {key: text for key, text in texts.items() if key.startswith("calibration")}
    for held_out in (key for key in texts if key.startswith("evaluation")):
        for key in (key for key, text in calibration.items() if _overlap(text, texts[held_out])):
            yield (
                f"{held_out} and {key} read the same text: pruned models seem closer to the dense model on it than "
                "they are on text that they weren't pruned on"
            )


def _overlap(one: TextSource, other: TextSource) -> bool:
    """Whether two sources are the same, or one is a file in the other's folder."""
    if one.path is None or other.path is None:
        parts = ("path", "dataset", "name", "split", "revision")
        return all(getattr(one, part) == getattr(other, part) for part in parts)
    first, second = Path(one.path).resolve(), Path(other.path).resolve()
    return first == second or first.parent == second or second.parent == first


def _rounds_on_all_samples(config: SweepConfig, methods: Mapping[str, Method]) -> Iterator[str]:
    """Methods for whose later rounds calibration can't end early: the criteria of others don't score these."""
    if config.calibration.settled is None:
        return
    for name, method in methods.items():
        has_rounds = any(len(round_ratios(method, ratio)) > 1 for ratio in config.ratios)
        if has_rounds and not any(CRITERIA[it].has_halves for it in method.scored_before):
            yield (
                f"calibration.settled has no effect in later rounds of {name}, which use all samples: "
                f"{method.scored_by} alone can't show when what is kept has settled"
            )


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


def _idle_rows(distillation: DistillationConfig) -> list[str]:
    """A forward pass that has more rows than the whole step it belongs to."""
    at_once, batch_size = distillation.rows_at_once, distillation.batch_size
    if at_once <= batch_size:
        return []
    return [
        f"distillation.micro_batch_size is {at_once} and batch_size {batch_size}: each rank computes {at_once} rows in "
        f"a step, and only {batch_size} of them all count"
    ]

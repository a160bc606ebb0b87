"""Warnings about settings that are valid, but with which results mislead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.texts import FIRST


def remarks_on_settings(config: SweepConfig, methods: Mapping[str, Method]) -> list[str]:
    """A sentence about each such setting."""
    return [*_without_effect(config, methods), *_seen_before(config, methods)]


def _without_effect(config: SweepConfig, methods: Mapping[str, Method]) -> Iterator[str]:
    """Settings of the ``prune`` section, for all methods, that change nothing with some of them."""
    for name in config.prune.model_dump(exclude_none=True):
        if unmoved := [label for label, method in methods.items() if name in method.without_effect]:
            yield f"prune.{name} changes nothing with {', '.join(unmoved)}"


def _seen_before(config: SweepConfig, methods: Mapping[str, Method]) -> Iterator[str]:
    """Texts for comparison that models are also pruned on."""
    calibrates = config.importance.criteria or any(method.prunes_in == "calibration" for method in methods.values())
    if not calibrates:
        return
    mixture = config.calibration.mixture
    pruned_on: dict[str, TextSource] = {f"calibration.mixture.{n}": text for n, text in enumerate(mixture or [])}
    for name, held_out in (config.evaluation.fidelity.texts or {FIRST: config.evaluation.fidelity}).items():
        key = f"evaluation.fidelity.texts.{name}" if name else "evaluation.fidelity"
        for other, text in (pruned_on or {"calibration": config.calibration}).items():
            if _overlap(text, held_out):
                yield (
                    f"{key} and {other} read the same text: pruned models seem closer to the dense model on it than "
                    "they are on text that they weren't pruned on"
                )


def _overlap(one: TextSource, other: TextSource) -> bool:
    """Whether two sources are the same, or one is a file in the other's folder."""
    if one.path is None or other.path is None:
        parts = ("path", "dataset", "name", "split", "revision")
        return all(getattr(one, part) == getattr(other, part) for part in parts)
    first, second = Path(one.path).resolve(), Path(other.path).resolve()
    return first == second or first.parent == second or second.parent == first

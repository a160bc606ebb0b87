"""Agreement of criteria: of their scores, and of the units that they keep."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hfprune_dist.errors import UserError
from hfprune_dist.results.markdown import Column
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, NEURONS, SHARED_NEURONS
from hfprune_dist.structures.score_names import SCORES, criteria_in, scores_of_layers

# Criterion -> its scores of every layer's units.
Scores = Mapping[str, list[NDArray[np.float64]]]
# Two criteria: their names, and their agreement in each layer.
Pair = Mapping[str, Any]
# Kinds of units that a layer's MLPs consist of.
_MLPS = (NEURONS, EXPERT_NEURONS, SHARED_NEURONS)


def read_scores(importance: Path) -> dict[str, list[NDArray[np.float64]]]:
    """Criterion -> its scores of every layer's neurons, from an importance artifact; those of experts are concatenated.
    If only whole experts were scored, their scores.

    Raises:
        UserError: if the file is missing or damaged.
    """
    file = importance / SCORES
    try:
        stored = load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged ({error})") from None
    scores = {}
    for name in sorted(criteria_in(stored)):
        of_kinds = [found for kind in _MLPS if (found := scores_of_layers(stored, name, kind))]
        of_kinds = of_kinds or [scores_of_layers(stored, name, EXPERTS)]
        scores[name] = [np.concatenate(layer) for layer in zip(*of_kinds, strict=True)]
    return scores


def compare_criteria(scores: Scores, shares_kept: Sequence[float]) -> list[dict[str, Any]]:
    """For every pair of criteria that score the same units: rank correlation (None where it isn't defined) and overlap
    of the kept sets, layer by layer.

    Args:
        shares_kept: widths to compare, as shares of the layer's units.
    """
    pairs = []
    for one, other in combinations(scores, 2):
        layers = [(a, b) for a, b in zip(scores[one], scores[other], strict=True) if len(a)]
        if all(len(a) == len(b) for a, b in layers):
            overlaps = {f"{share:g}": [overlap(a, b, share) for a, b in layers] for share in shares_kept}
            pairs.append({"criteria": [one, other], "spearman": [spearman(*it) for it in layers], "overlap": overlaps})
    return pairs


def spearman(a_D: NDArray[np.float64], b_D: NDArray[np.float64]) -> float | None:
    """Rank correlation; equal scores share the average of their ranks. None if all scores of one criterion are equal,
    as those of a single unit are: it isn't defined.
    """
    if len(np.unique(a_D)) < 2 or len(np.unique(b_D)) < 2:
        return None
    return float(np.corrcoef(_average_ranks(a_D), _average_ranks(b_D))[0, 1])


def _average_ranks(scores_D: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place_D, counts = np.unique(scores_D, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place_D])


def overlap(a_D: NDArray[np.float64], b_D: NDArray[np.float64], share: float) -> float:
    """Share of the units kept by one criterion that the other one keeps too."""
    width = max(1, round(share * len(a_D)))
    kept = [set(np.argsort(-scores_D, kind="stable")[:width].tolist()) for scores_D in (a_D, b_D)]
    return len(kept[0] & kept[1]) / width


def columns_of_pairs(pairs: Sequence[Pair]) -> list[Column[Pair]]:
    """Columns for pairs of criteria, as ``compare_criteria`` returns them: means over layers."""
    shares = list(pairs[0]["overlap"]) if pairs else []
    return [
        Column("criteria", lambda it: " / ".join(it["criteria"]), is_text=True),
        Column("Spearman", lambda it: _mean(it["spearman"])),
        *(Column(f"overlap at {float(share):.0%}", partial(_mean_overlap, share)) for share in shares),
    ]


def _mean_overlap(share: str, pair: Pair) -> str:
    return _mean(pair["overlap"][share])


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"

"""Agreement of criteria: of their scores, and of the units that they keep."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
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
    neurons, experts = scores_to_compare(importance)
    return {name: neurons.get(name) or experts[name] for name in sorted({*neurons, *experts})}


def scores_to_compare(importance: Path) -> tuple[Scores, Scores]:
    """Criterion -> its scores of every layer's neurons, as in ``read_scores``; and the same of whole experts.

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
    of_all = ({name: _of_layers(stored, name, kinds) for name in criteria_in(stored)} for kinds in (_MLPS, [EXPERTS]))
    neurons, experts = ({name: rows for name, rows in of_kinds.items() if rows} for of_kinds in of_all)
    return neurons, experts


def _of_layers(
    stored: Mapping[str, NDArray[np.float64]], criterion: str, kinds: Sequence[str]
) -> list[NDArray[np.float64]]:
    of_kinds = (scores_of_layers(stored, criterion, kind) for kind in kinds)
    layers = zip(*(of_layers for of_layers in of_kinds if of_layers), strict=True)
    return [np.concatenate(of_layer) if len(of_layer) > 1 else of_layer[0] for of_layer in layers]


def compare_criteria(of_units: Iterable[Scores], shares_kept: Sequence[float]) -> list[dict[str, Any]]:
    """For every pair of criteria: rank correlation (None where it isn't defined) and overlap of the kept sets,
    layer by layer.

    Args:
        of_units: for each sort of units, criterion -> scores of each layer, float64 [units]. A pair is compared by the
            first that both score, in the layers that have such units.
        shares_kept: widths to compare, as shares of the layer's units.
    """
    pairs: dict[tuple[str, str], list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for scores in of_units:
        for first, second in combinations(scores, 2):
            layers = zip(scores[first], scores[second], strict=True)
            pairs.setdefault((first, second), [layer for layer in layers if len(layer[0])])
    return [
        {
            "criteria": list(names),
            "spearman": [spearman(a, b) for a, b in pairs[names]],
            "overlap": {f"{share:g}": [overlap(a, b, share) for a, b in pairs[names]] for share in shares_kept},
        }
        for names in sorted(pairs)
    ]


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
    """Share of the units kept by one criterion that the other one keeps too.

    Where some of several equal scores would stay, each criterion draws at random which: this is the expected share.
    """
    width = max(1, round(share * len(a_D)))
    return float(_chances_to_stay(a_D, width) @ _chances_to_stay(b_D, width) / width)


def _chances_to_stay(scores_D: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    last = np.sort(scores_D)[-width]
    above_D, level_D = scores_D > last, scores_D == last
    chances_D: NDArray[np.float64] = np.where(level_D, (width - above_D.sum()) / level_D.sum(), above_D)
    return chances_D


def columns_of_pairs(pairs: Sequence[Pair]) -> list[Column[Pair]]:
    """Columns for pairs of criteria, as ``compare_criteria`` returns them: means over layers."""
    shares = list(pairs[0]["overlap"]) if pairs else []
    return [
        Column("criteria", lambda it: " / ".join(it["criteria"]), is_text=True),
        Column("Spearman", lambda it: _mean(it["spearman"])),
        *(Column(f"overlap at {float(share):.0%}", partial(_mean_overlap, share=share)) for share in shares),
    ]


def _mean_overlap(pair: Pair, share: str) -> str:
    return _mean(pair["overlap"][share])


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"

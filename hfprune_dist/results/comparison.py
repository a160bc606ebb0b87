"""Methods and criteria compared over sweeps that differ in their seed: means, spreads, and agreement of scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import NONE
from hfprune_dist.results.column import Column, markdown
from hfprune_dist.results.formats import byte_count, duration, measured, number
from hfprune_dist.results.markdown import escaped, table_of_texts
from hfprune_dist.results.rows import Row
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, NEURONS, SHARED_NEURONS
from hfprune_dist.structures.score_names import SCORES, criteria_in, scores_of_layers

Scores = Mapping[str, list[NDArray[np.float64]]]
MEASURES = ("kl", "top1_agreement", "perplexity", "average")
# Kinds of units that a layer's MLPs consist of.
_MLPS = (NEURONS, EXPERT_NEURONS, SHARED_NEURONS)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over sweeps; the deviation is None for a single sweep."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Comparison:
    """Results of one method, on one model at one ratio.

    Attributes:
        measures: kl, top1_agreement, perplexity, and the average of the tasks' scores; None if the value isn't a number
            in some sweep.
        kl_share: KL divided by the reference method's KL in the same sweep, over sweeps with a reference; None without
            any, and if KL isn't a number in one of them. Where pruning and recovery are one training, the reference is
            the recovered one.
        sweeps: number of sweeps with a result.
        wall_time_s: time of all stages behind a row, shared ones included; mean over the rows for which it is known.
        peak_memory_bytes: the highest peak of a rank in any of these stages, None if none was recorded.
    """

    model: str
    ratio: float
    method: str
    recovery: str
    measures: Mapping[str, Spread | None]
    kl_share: Spread | None
    sweeps: int
    wall_time_s: float | None
    peak_memory_bytes: int | None


def compare_methods(sweeps: Sequence[Sequence[Row]], reference: str) -> list[Comparison]:
    """Group the finished rows of several sweeps by model, ratio, method and recovery, in order of first appearance."""
    groups: dict[tuple[str, float, str, str], list[tuple[Row, float | None]]] = {}
    for rows in sweeps:
        done = [row for row in rows if row["status"] == "done"]
        references = {_place(row): row["kl"] for row in done if row["method"] == reference}
        for row in done:
            key = (row["model"], row["ratio"], row["method"] or "dense", row["recovery"])
            groups.setdefault(key, []).append((row, references.get(_place(row))))
    return [_comparison(*key, members) for key, members in groups.items()]


def _place(row: Row) -> tuple[str, float, bool, str]:
    """Key shared by rows of a sweep that can be compared; rows of its earlier runs may be measured in another way."""
    return row["model"], row["ratio"], row["recovery"] != NONE, row["measured_as"]


def _comparison(
    model: str, ratio: float, method: str, recovery: str, members: Sequence[tuple[Row, float | None]]
) -> Comparison:
    rows = [row for row, _ in members]
    shares = [None if row["kl"] is None else row["kl"] / reference for row, reference in members if reference]
    times = [row["wall_time_s"] for row in rows if row["wall_time_s"] is not None]
    return Comparison(
        model,
        ratio,
        method,
        recovery,
        {name: _spread_of_known([row[name] for row in rows]) for name in MEASURES},
        _spread_of_known(shares) if shares else None,
        len(rows),
        statistics.fmean(times) if times else None,
        max((row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"]), default=None),
    )


def _spread_of_known(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return spread(known) if len(known) == len(values) else None


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation."""
    listed = list(values)
    return Spread(statistics.fmean(listed), statistics.stdev(listed) if len(listed) > 1 else None)


def read_scores(importance: Path) -> dict[str, list[NDArray[np.float64]]]:
    """Criterion -> its scores of every layer's neurons, from an importance artifact; those of experts are concatenated.
    If only whole experts were scored, their scores.

    Raises:
        UserError: if the file is missing.
    """
    neurons, experts = scores_to_compare(importance)
    return {name: neurons.get(name) or experts[name] for name in sorted({*neurons, *experts})}


def scores_to_compare(importance: Path) -> tuple[Scores, Scores]:
    """Criterion -> its scores of every layer's neurons, as in ``read_scores``; and the same of whole experts.

    Raises:
        UserError: if the file is missing.
    """
    file = importance / SCORES
    if not file.is_file():
        raise UserError(f"{file}: missing; run the sweep again, it makes only what is missing")
    stored = load_file(file)
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
    """For every pair of criteria: rank correlation (None in a layer with a single unit) and overlap of the kept sets,
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
    """Rank correlation; units with equal scores are ranked in their order. None for a single unit: it isn't defined."""
    if len(a_D) < 2:
        return None
    a_ranks_D, b_ranks_D = (np.argsort(np.argsort(it, kind="stable")) for it in (a_D, b_D))
    return float(np.corrcoef(a_ranks_D, b_ranks_D)[0, 1])


def overlap(a_D: NDArray[np.float64], b_D: NDArray[np.float64], share: float) -> float:
    """Share of the units kept by one criterion that the other one keeps too."""
    width = max(1, round(share * len(a_D)))
    kept = [set(np.argsort(-it, kind="stable")[:width].tolist()) for it in (a_D, b_D)]
    return len(kept[0] & kept[1]) / width


# Header of a column -> what it says.
_MEANINGS = {
    "KL": "mean divergence from the dense model, nats per token, lower is better",
    "agreement": "share of tokens with its most likely next token, higher is better",
    "avg": "mean of the tasks' scores in %, higher is better",
}


def few_columns_of_methods(comparisons: Sequence[Comparison], reference: str) -> list[Column[Comparison]]:
    """The default columns, which fit a terminal 80 characters wide if names have the usual lengths."""
    differs = len({it.recovery for it in comparisons}) > 1
    return [
        Column("model", lambda it: it.model, is_text=True),
        Column("ratio", lambda it: f"{it.ratio:g}" if it.ratio else "dense", is_text=True),
        Column("method", lambda it: it.method, is_text=True),
        *[Column[Comparison]("recovery", lambda it: it.recovery, is_text=True)] * differs,
        Column("KL", lambda it: _shown(it.measures["kl"], 3)),
        Column(f"KL / {reference}", lambda it: _shown(it.kl_share, 3)),
        Column("agreement", lambda it: _shown(it.measures["top1_agreement"], 3)),
        Column("seeds", lambda it: str(it.sweeps)),
    ]


def all_columns_of_methods(comparisons: Sequence[Comparison], reference: str) -> list[Column[Comparison]]:
    """All columns; the time is that of all stages behind a row, shared ones included."""
    scored = any(it.measures["average"] for it in comparisons)
    return [
        *few_columns_of_methods(comparisons, reference),
        Column("perplexity", lambda it: _shown(it.measures["perplexity"], 1)),
        *[Column[Comparison]("avg", lambda it: _shown(it.measures["average"], 1, 100))] * scored,
        Column("time", lambda it: duration(it.wall_time_s)),
        Column("memory", lambda it: byte_count(it.peak_memory_bytes)),
    ]


def note_on_methods(columns: Sequence[Column[Comparison]]) -> str:
    """A sentence for below the table, on what these columns say."""
    told = [f"{it.header}: {_MEANINGS[it.header]}" for it in columns if it.header in _MEANINGS]
    return "; ".join([*told, "±: standard deviation over seeds"])


def methods_table(comparisons: Sequence[Comparison], reference: str) -> str:
    """Markdown table of methods, with a note below."""
    columns = all_columns_of_methods(comparisons, reference)
    return f"{markdown(comparisons, columns)}\n{escaped(note_on_methods(columns))}\n"


def criteria_table(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of pairs of criteria: means over layers."""
    shares = list(pairs[0]["overlap"]) if pairs else []
    head = ["criteria", "Spearman", *(f"overlap, {float(share):.0%} kept" for share in shares)]
    lines = [
        [" / ".join(pair["criteria"]), _mean(pair["spearman"]), *(_mean(pair["overlap"][share]) for share in shares)]
        for pair in pairs
    ]
    return table_of_texts(head, lines) + "\n"


def convergence_table(points: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of the overlap between the units kept by two halves of the windows, by number of windows.

    Args:
        points: ``split_half_overlap`` from the metrics of an importance artifact.
    """
    numbers = sorted({point["windows"] for point in points})
    values = {(point["criterion"], point["share_kept"], point["windows"]): point["overlap"] for point in points}
    places = dict.fromkeys((criterion, share) for criterion, share, _ in values)
    compared = {point["criterion"]: point.get("compared", "scores") for point in points}
    head = ["criterion", "kept", *(f"{number} windows" for number in numbers)]
    lines = [
        [
            criterion if compared[criterion] == "scores" else f"{criterion} ({compared[criterion]})",
            f"{share:.0%}",
            *(_overlap(values.get((criterion, share, number))) for number in numbers),
        ]
        for criterion, share in places
    ]
    return table_of_texts(head, lines) + "\n"


def _overlap(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _shown(value: Spread | None, digits: int, times: int = 1) -> str:
    if value is None:
        return "-"
    if value.deviation is None:
        return number(times * value.mean, f".{digits}f")
    return measured(times * value.mean, times * value.deviation, digits)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3f}" if known else "-"

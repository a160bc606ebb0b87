"""What scores are called in the files of an importance artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count, takewhile
from typing import TypeVar

from hfprune_dist.structures import NEURONS

SCORES = "importance.safetensors"

ScoresT = TypeVar("ScoresT")


def score_name(layer: int, criterion: str, kind: str = NEURONS) -> str:
    """Of a layer's scores [units]: ``layers.3.entropy``, and of another kind ``layers.3.kv_groups.entropy``."""
    return ".".join(["layers", str(layer), *([] if kind == NEURONS else [kind]), criterion])


def scores_of_layers(stored: Mapping[str, ScoresT], criterion: str, kind: str = NEURONS) -> list[ScoresT]:
    """One criterion's scores of every layer's units of one kind, in the order of the layers.

    Args:
        stored: what ``SCORES`` holds, by name.
    """
    names = (score_name(layer, criterion, kind) for layer in count())
    return [stored[name] for name in takewhile(stored.__contains__, names)]


def criteria_in(stored: Iterable[str]) -> list[str]:
    """Names of the criteria by which units are scored there, sorted."""
    return sorted({name.rpartition(".")[2] for name in stored})

"""Names of scores in the files of an importance artifact."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import TypeVar

from hfprune_dist.structures import NEURONS

SCORES = "importance.safetensors"

ScoresT = TypeVar("ScoresT")


def score_name(layer: int, criterion: str, kind: str = NEURONS) -> str:
    """Return the name of a layer's scores [units]: ``layers.3.entropy``, or ``layers.3.kv_groups.entropy``."""
    return ".".join(["layers", str(layer), *([] if kind == NEURONS else [kind]), criterion])


def scores_of_layers(stored: Mapping[str, ScoresT], criterion: str, kind: str = NEURONS) -> list[ScoresT]:
    """Return one criterion's scores for one kind of units, layer by layer, from what the file ``SCORES`` stores."""
    names = (score_name(layer, criterion, kind) for layer in count())
    return [stored[name] for name in takewhile(stored.__contains__, names)]

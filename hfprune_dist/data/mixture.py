"""Windows from several texts in given shares, mixed so that every part of the windows has these shares too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hfprune_dist.data.windows import Sampling, Windows, read_windows


@dataclass(frozen=True)
class Source:
    """A text of a mixture.

    Attributes:
        settings: as in ``read_windows``.
        path: the local file or folder; None streams the hub data set.
        windows: number of windows that are cut from it.
    """

    settings: Mapping[str, Any]
    path: Path | None
    windows: int


def read_mixture(
    sources: Sequence[Source], tokenizer: Any, sampling: Sampling, apart: Sequence[bool], where: str
) -> Windows:
    """Cut windows from several texts, from each text as ``read_windows`` does.

    Args:
        sampling: how all windows are cut; ``samples`` is the total number of the sources' windows.
        apart: for each window, whether it will be kept apart from others; see ``interleaved``.
        where: what the texts are for, for messages.

    Raises:
        UserError: if a text can't be read, or none of its documents is long enough.
    """
    drawn = [
        read_windows(source.settings, source.path, tokenizer, replace(sampling, samples=source.windows), where)
        for source in sources
    ]
    left = [iter(windows.input_ids_ST) for windows in drawn]
    order = interleaved([source.windows for source in sources], apart, sampling.seed)
    return Windows(
        torch.stack([next(left[index]) for index in order]),
        sum(windows.documents_read for windows in drawn),
        sum(windows.documents_used for windows in drawn),
        sum(windows.tokens for windows in drawn),
    )


def interleaved(counts: Sequence[int], apart: Sequence[bool], seed: int) -> list[int]:
    """The number of the text that each window is from, in the order of the windows.

    Stratified: the k-th of a text's ``count`` windows gets the position (k + u) / count, with u uniform in [0, 1), and
    windows are sorted by position. Every run of windows then has each text in about its share, without a period that
    could coincide with shards. Windows that will be kept apart are dealt first, and the others after them, so that both
    groups have the texts in their shares. Counts are off by less than 1 + the number of texts, in what is kept apart
    and in any first or last part of the others.

    Args:
        counts: number of windows of each text.
        apart: for each window, whether it is kept apart.
        seed: determines the random part.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [
        (torch.rand(count, generator=generator, dtype=torch.float64) + torch.arange(count)) / count for count in counts
    ]
    texts = [text for text, count in enumerate(counts) for _ in range(count)]
    dealt = torch.cat(places).argsort(stable=True).tolist()
    windows = sorted(range(len(apart)), key=lambda window: not apart[window])
    order = [0] * len(windows)
    for window, number in zip(windows, dealt, strict=True):
        order[window] = texts[number]
    return order

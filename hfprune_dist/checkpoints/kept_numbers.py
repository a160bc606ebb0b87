"""``kept.json`` next to a pruned checkpoint, read as plain numbers, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_dist.store.atomic_files import read_json

KEPT = "kept.json"
FORMAT = 2

Numbers = Mapping[str, Sequence[Sequence[int]]]


def read_kept_numbers(folder: Path) -> tuple[tuple[int, ...], Numbers]:
    """The layers that stay, and kind -> the units that each of these layers keeps, in the dense model's numbering.

    Earlier versions wrote only the neurons of each layer, under ``layers``.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    content: dict[str, Any] | None = read_json(folder / KEPT)
    if content is None:
        raise FileNotFoundError(f"{folder / KEPT}: missing")
    layers = content.pop("layers")
    if "format" not in content:
        return tuple(range(len(layers))), {"neurons": layers}
    assert content.pop("format") == FORMAT, f"{folder / KEPT} is of a later version"
    return tuple(layers), content

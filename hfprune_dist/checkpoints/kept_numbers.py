"""``kept.json`` next to a pruned checkpoint, read as plain numbers, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import read_json

KEPT = "kept.json"
FORMAT = 2

Numbers = Mapping[str, Sequence[Sequence[int]]]


def read_kept_numbers(folder: Path) -> tuple[tuple[int, ...], Numbers]:
    """The layers that stay, and kind -> the units that each of these layers keeps, in the dense model's numbering.

    Earlier versions wrote only the neurons of each layer, under ``layers``.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if a later version wrote it.
    """
    content: dict[str, Any] | None = read_json(folder / KEPT)
    if content is None:
        raise FileNotFoundError(f"{folder / KEPT}: missing")
    version, layers = content.pop("format", None), content.pop("layers")
    if version is None:
        return tuple(range(len(layers))), {"neurons": layers}
    if version != FORMAT:
        raise UserError(f"{folder / KEPT}: has format {version}, which a later version wrote; use that version")
    return tuple(layers), content

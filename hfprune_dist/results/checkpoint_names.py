"""What the checkpoints of a sweep's rows are called in its folder ``checkpoints/``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from hfprune_dist.planning.plan import NONE, OWN, Cell
from hfprune_dist.store.hashing import digest_of

LONGEST = 96  # as names of the hub's repositories are limited
_DIGITS = 6
# What names keep of others' letters and digits.
_KNOWN = re.compile(r"[A-Za-z0-9]")


def checkpoint_names(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Name -> the row that it stands for; a dense model without recovery is the user's own and has none.

    A name is made like a row's label, ``llama-0.2-lora``, of characters that file systems and the hub allow. The method
    is part of it where rows have several. Rows whose names would be the same, or differ in upper and lower case alone,
    get 6 hex digits each that depend on nothing but the row; so do those of a model of whose name nothing is left.
    """
    named = [cell for cell in cells if cell.producers]
    several = len({cell.method for cell in named} - {None}) > 1
    names = [_plain_name(cell, several) for cell in named]
    taken = Counter(name.casefold() for name in names)
    return {
        name if taken[name.casefold()] == 1 and _tells(name, cell) else with_digits(name, cell): cell
        for name, cell in zip(names, named, strict=True)
    }


def _tells(name: str, cell: Cell) -> bool:
    """Whether a name is short enough, and has something of its model's."""
    return len(name) <= LONGEST and _KNOWN.search(cell.model) is not None


def with_digits(name: str, cell: Cell) -> str:
    """A name that no other row has: this one, cut where it is too long, and digits from all that tells rows apart."""
    digits = digest_of([cell.model, cell.ratio, cell.method, cell.recovery])[:_DIGITS]
    return f"{name[: LONGEST - _DIGITS - 1].rstrip('-.')}-{digits}"


def _plain_name(cell: Cell, with_method: bool) -> str:
    ratio = "dense" if cell.ratio is None else f"{cell.ratio:g}"
    method = cell.method if with_method else None
    recovery = None if cell.recovery in (NONE, OWN) else cell.recovery
    model = cell.model if _KNOWN.search(cell.model) else "model"
    name = "-".join(part for part in (model, ratio, method, recovery) if part)
    name = re.sub(r"[^A-Za-z0-9._]+", "-", name)
    return re.sub(r"-*\.{2,}-*|-{2,}", "-", name).strip("-.")

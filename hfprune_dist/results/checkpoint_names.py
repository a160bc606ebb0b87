"""Names of rows' checkpoints in the folder ``checkpoints/`` of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from hfprune_dist.planning.plan import NONE, OWN, Cell
from hfprune_dist.store.hashing import digest_of

LONGEST = 96  # the hub's limit for names of repositories
_DIGITS = 6
# Letters and digits of a model's name that checkpoint names keep.
_KNOWN = re.compile(r"[A-Za-z0-9]")


def checkpoint_names(cells: Sequence[Cell]) -> dict[str, Cell]:
    """Name -> its row. Dense models without recovery have no name, since they are the user's own checkpoints.

    A name resembles the row's label, e.g. ``llama-0.2-lora``, in characters that file systems and the hub allow. It
    includes the method if rows have several. Rows whose names would be the same, or differ only in case, get 6 hex
    digits that depend only on the row; so do those with names that are too long or keep nothing of the model's name.
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
    """Whether a name is short enough and keeps something of its model's name."""
    return len(name) <= LONGEST and _KNOWN.search(cell.model) is not None


def with_digits(name: str, cell: Cell) -> str:
    """A unique name: this one, cut if it is too long, with digits derived from everything that tells rows apart."""
    digits = digest_of([cell.model, cell.ratio, cell.method, cell.recovery])[:_DIGITS]
    return f"{name[: LONGEST - _DIGITS - 1].rstrip('-.')}-{digits}"


def _plain_name(cell: Cell, with_method: bool) -> str:
    ratio = "dense" if cell.ratio is None else f"{cell.ratio:g}"
    method = cell.method if with_method else None
    recovery = None if cell.recovery in (NONE, OWN) else cell.recovery
    model = cell.model if _KNOWN.search(cell.model) else "model"
    name = "-".join(part for part in (model, ratio, method, recovery) if part)
    name = re.sub(r"[^A-Za-z0-9._]+", "-", name)
    return re.sub(r"-*(?:\.{2,}-*)+|-{2,}", "-", name).strip("-.")

"""Order in which layers are removed: always the one whose measured loss is smallest, measured again after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Sets of removed layers, ascending -> KL divergence from the dense model, nats per token, of the models without them.
MeasureWithout = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]

# All layers are measured for the first removal. For each later one, only this many are: those left whose removal by
# itself cost least. Of ten layers removed from a small model, each was among these five.
CONTENDERS = 5


def drop_order(droppable: Sequence[int], count: int, measure: MeasureWithout) -> list[int]:
    """Return the ``count`` layers to remove, in order; fewer if ``droppable`` has fewer.

    Args:
        measure: called once for every layer that is removed.
    """
    order: list[int] = []
    left = list(droppable)
    while left and len(order) < count:
        contenders = left[:CONTENDERS] if order else left
        kls = measure([tuple(sorted([*order, layer])) for layer in contenders])
        ranked = [layer for _, layer in sorted(zip(kls, contenders, strict=True))]
        if not order:
            left = ranked
        order.append(ranked[0])
        left.remove(ranked[0])
    return order

"""In which order layers are given up: next the one whose loss is measured to be smallest, again after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Layers that go, ascending -> KL divergence from the dense model, nats per token, of the model without them.
MeasureWithout = Callable[[Sequence[tuple[int, ...]]], Sequence[float]]

# After the first, those that were missed least when each went alone are measured again, this many at a time. Of ten
# layers of a small model, each was among the first five.
CONTENDERS = 5


def drop_order(droppable: Sequence[int], count: int, measure: MeasureWithout) -> list[int]:
    """The ``count`` layers to give up, in order; fewer where there aren't so many.

    Args:
        measure: called once for every layer that goes.
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

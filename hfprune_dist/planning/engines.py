"""Which engines will load what a method makes of a model, as far as its shapes are known before a stage runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hfprune_dist.checkpoints.engines import ENGINES, fit
from hfprune_dist.checkpoints.pruned_config import pruned_config
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.target import Target
from hfprune_dist.structures import EXPERTS, KV_GROUPS, NEURONS
from hfprune_dist.structures.kept import Shape


def refuse_what_engines_lack(target: Target, method: Method, shapes: Sequence[Shape]) -> None:
    """Refuse shapes, as ``shapes_for`` returns them, that an engine of ``for_engines`` doesn't load.

    Raises:
        UserError: naming the engine, what it lacks, and the way round.
    """
    config = _config(target, method, shapes)
    for engine in method.for_engines:
        if not (found := fit(engine, config)).loads:
            raise UserError(f"{target.where}: {engine} (prune.for_engines) won't load it: {found.told}")


def remarks_on_engines(target: Target, method: Method, shapes: Sequence[Shape]) -> Iterator[str]:
    """Sentences on engines that won't load all of the shapes, and on the way round."""
    config, lacks = _config(target, method, shapes), dict[str, list[str]]()
    for engine in ENGINES:
        if not (found := fit(engine, config)).loads:
            lacks.setdefault(found.told, []).append(engine)
    for told, engines in lacks.items():
        yield f"{target.where}: {', '.join(engines)} won't load {'it' if len(shapes) < 2 else 'some shapes'}: {told}"


def _config(target: Target, method: Method, shapes: Sequence[Shape]) -> dict[str, Any]:
    """The config.json of one of the shapes, as far as engines ask: the one that the fewest load."""
    dense, layers = target.dense, tuple(range(target.dense.num_layers))
    shape = shapes[0] if shapes else Shape(layers)
    if target.competes:  # layers differ in what may go
        counts = {kind: dense.structures[kind].counts for kind in (NEURONS, KV_GROUPS) if kind in target.structures}
        shape = Shape(layers, {kind: (max(row[0] - 1, min(row[0], 1)), *row[1:]) for kind, row in counts.items()})
    elif target.allocation == "plain" and EXPERTS not in target.structures:
        fewest = min(shape.units[KV_GROUPS][0] for shape in shapes)
        shape = Shape(layers, {KV_GROUPS: (fewest,) * len(layers)})
    biased = [units.output for units in dense.pruned_kinds(method.structures)] if method.refit == "bias" else []
    return pruned_config(dense, shape, biased, target.for_engines)

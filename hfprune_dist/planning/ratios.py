"""What a method comes to on a model: its settings as numbers, and which ratios can be reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.engines import ENGINES, fit
from hfprune_dist.checkpoints.pruned_config import pruned_config
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.methods.sdmprune import LACKS, lacking
from hfprune_dist.planning.methods import refuse_model, suited
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.planning.target import Target
from hfprune_dist.structures import EXPERTS, KV_GROUPS, NEURONS
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.low_rank import rank_field

# What ``multiple_of: auto`` tries, in this order: sizes that run fast on hardware; and the largest share of a model's
# parameters that one step of such a size may be, in all layers together.
MULTIPLES, LARGEST_STEP = (256, 128, 64, 32), 0.0125
# From width WIDE on, every multiple is at least LEAST.
WIDE, LEAST = 1024, 32
# What settings without effect become, so that they move no fingerprint.
NEUTRAL = {"floor": 0.0, "protect_first": 0, "protect_last": 0, "tensor_parallel": 1, "effort": "thorough"}


def place_of(model: str, method: str) -> str:
    """Name a model and a method, for messages."""
    return f"model {model!r}, method {method!r}"


def with_numbers(method: Method, checkpoint: Checkpoint) -> Method:
    """The method as it suits the model, with numbers for ``multiple_of``, which ``tensor_parallel`` divides and the
    multiples of ``for_engines``, and for the protected layers; settings without effect are ``NEUTRAL``.
    """
    method, layers = suited(method, checkpoint), checkpoint.num_layers
    shares = {"protect_first": method.protect_first, "protect_last": method.protect_last}
    numbers = {name: round(share * layers) if isinstance(share, float) else share for name, share in shares.items()}
    method = method.model_copy(update=numbers | {name: NEUTRAL[name] for name in method.without_effect})
    multiple_of = _what_auto_is(method, checkpoint) if method.multiple_of == "auto" else method.multiple_of
    of_engines = [] if EXPERTS in method.structures else [ENGINES[name].multiple_of for name in method.for_engines]
    return method.model_copy(update={"multiple_of": math.lcm(multiple_of, method.tensor_parallel, *of_engines)})


def _what_auto_is(method: Method, checkpoint: Checkpoint) -> int:
    if EXPERTS in method.structures:
        return 1
    step = checkpoint.num_layers * checkpoint.units.copies * checkpoint.parameters_per_unit / checkpoint.parameters
    fallback = LEAST if checkpoint.units.width >= WIDE else 1
    return next((multiple for multiple in MULTIPLES if multiple * step <= LARGEST_STEP), fallback)


def check_ratios(checkpoint: Checkpoint, ratios: Iterable[float], method: Method, where: str) -> None:
    """Refuse ratios that a method can't reach on a model, naming the nearest, or what of the model it can't prune."""
    method = suited(method, checkpoint)
    refuse_model(method, checkpoint, where)
    if checkpoint.ranks:
        raise UserError(
            f"{where}: its attention has matrices of low rank ({', '.join(map(rank_field, checkpoint.ranks))} in "
            "config.json), so it has been pruned already; prune the model that it came from, at a larger ratio"
        )
    for ratio in ratios:
        target = Target.from_settings(checkpoint, with_numbers(method, checkpoint), ratio, where)
        _refuse_engines(target, method, shapes_for(target))
        _check_student(checkpoint, ratio, method, where)


def _refuse_engines(target: Target, method: Method, shapes: Sequence[Shape]) -> None:
    """Refuse shapes that an engine of ``for_engines`` doesn't load, by the one that the fewest load."""
    dense, layers = target.dense, tuple(range(target.dense.num_layers))
    shape = min(shapes, key=lambda shape: shape.units.get(KV_GROUPS, (0,))[0], default=Shape(layers))
    if target.competes:  # layers differ in what may go
        counts = {kind: dense.structures[kind].counts for kind in (NEURONS, KV_GROUPS) if kind in target.structures}
        shape = Shape(layers, {kind: (max(row[0] - 1, min(row[0], 1)), *row[1:]) for kind, row in counts.items()})
    biased = [units.output for units in dense.pruned_kinds(method.structures)] if method.refit == "bias" else []
    for engine in method.for_engines:
        if not (found := fit(engine, dense.config_file(pruned_config(dense, shape, biased)))).loads:
            raise UserError(f"{target.where}: {engine} (prune.for_engines) won't load it: {found.told}")


def _check_student(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> None:
    """Refuse a ratio at which some neurons without a score would stay: those that the student lacks."""
    if method.student_chosen_by is None:
        return
    lacks = sum(lacking(count, LACKS) for count in checkpoint.units.counts)
    least = lacks * checkpoint.parameters_per_unit / checkpoint.parameters
    if ratio < least:
        raise UserError(
            f"{where}: ratio {ratio:g} removes less than the student of {method.criterion} lacks, which is "
            f"{least:.4f} of all parameters; use a larger ratio"
        )

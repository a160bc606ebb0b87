"""What a method comes to on a model: its settings as numbers, which ratios can be reached, and sizes for dry runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.methods.sdmprune import LACKS, lacking
from hfprune_dist.planning.legality import can_do, refuse_model, suited, why_not
from hfprune_dist.planning.shapes import ALIGNED, Target, plain_shapes, shapes_for
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, KV_GROUPS, LAYERS
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.low_rank import rank_field

# What ``multiple_of: auto`` tries, in this order: sizes that run fast on hardware, if that costs few parameters.
MULTIPLES = (256, 128, 64, 32)
# The share of all parameters that may be removed beyond the ratio.
MOST_BEYOND = 0.0125
# From width WIDE on, every multiple is at least LEAST.
WIDE, LEAST = 1024, 32
# Architectures of which vLLM and SGLang take hidden_size / heads as the size of a head, whatever head_dim says.
_HEADS_SHARE_HIDDEN_SIZE = {"qwen2"}


def with_numbers(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> Method:
    """The method as it suits the model, with numbers for ``multiple_of`` and the protected layers; if KV groups may go,
    ``tensor_parallel`` divides ``multiple_of``.

    Raises:
        UserError: if ``tensor_parallel`` divides no number of KV groups.
    """
    method = suited(method, checkpoint)
    given = {"protect_first": method.protect_first, "protect_last": method.protect_last}
    numbers = {name: round(it * checkpoint.num_layers) if isinstance(it, float) else it for name, it in given.items()}
    method = method.model_copy(update=numbers)
    multiple_of = method.multiple_of
    if multiple_of == "auto":
        multiple_of = _what_auto_is(method, checkpoint, ratio, where)
    return method.model_copy(update={"multiple_of": math.lcm(multiple_of, method.split)})


def _what_auto_is(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> int:
    """The largest multiple with which every shape that competes removes at least the ratio, and little more; of experts
    1. If layers compete, plain shapes must be possible too, since these are measured beside others.
    """
    if EXPERTS in method.structures:
        return 1
    finest = Target.of(checkpoint, method.model_copy(update={"multiple_of": 1}), ratio, where)

    def shapes(multiple_of: int) -> list[Shape]:
        target = replace(finest, multiple_of=math.lcm(multiple_of, method.split))
        try:
            decided = [] if target.allocation == "plain" else shapes_for(target)
            return decided or plain_shapes(target)
        except UserError:
            return []

    most, ratio_of = len(shapes(1)), checkpoint.parameter_counts.ratio
    for multiple_of in MULTIPLES:
        found = shapes(multiple_of)
        if len(found) == most > 0 and all(ratio - 1e-9 <= ratio_of(it) <= ratio + MOST_BEYOND for it in found):
            return multiple_of
    return LEAST if checkpoint.units.width >= WIDE else 1


def check_ratios(checkpoint: Checkpoint, ratios: Iterable[float], method: Method, where: str) -> None:
    """Refuse ratios that a method can't reach on a model.

    Raises:
        UserError: naming the nearest ratio that it reaches; or what of the model the method can't prune.
    """
    method = suited(method, checkpoint)
    refuse_model(method, checkpoint, where)
    if checkpoint.family.experts:
        _refuse_unaligned(checkpoint, where)
    if checkpoint.ranks:
        raise UserError(
            f"{where}: its attention has matrices of low rank ({', '.join(map(rank_field, checkpoint.ranks))} in "
            "config.json), so it has been pruned already; prune the model that it came from, at a larger ratio"
        )
    for ratio in ratios:
        shapes_for(Target.of(checkpoint, with_numbers(method, checkpoint, ratio, where), ratio, where))
        _check_student(checkpoint, ratio, method, where)


def _refuse_unaligned(checkpoint: Checkpoint, where: str) -> None:
    """Refuse a mixture whose experts transformers can't run."""
    width, hidden_size = checkpoint.structures[EXPERT_NEURONS].width, checkpoint.config["hidden_size"]
    for what, size in ((f"its experts have {width} neurons", width), (f"hidden_size is {hidden_size}", hidden_size)):
        if size % ALIGNED:
            raise UserError(
                f"{where}: {what}, but transformers multiplies experts' matrices in groups, whose rows must be "
                f"multiples of {ALIGNED}"
            )


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


def remarks_on_shapes(checkpoint: Checkpoint, ratios: Sequence[float], method: Method, where: str) -> list[str]:
    """Sentences for dry runs about a method's settings that depend on the model."""
    if not can_do(method, checkpoint):
        return [f"{where}: left out, since the model {next(why_not(method, checkpoint))}"]
    family, left = checkpoint.family, suited(method, checkpoint)
    told = [f"{where}: KV groups stay: {family.whole_groups}"] if left.structures != method.structures else []
    if left.refit != method.refit:
        norms = ", and no norm is refitted" if method.effort == "thorough" else ""
        told.append(f"{where}: refit is {left.refit}{norms}: {family.no_sequence}")
    if left.multiple_of == "auto":
        multiples = [(ratio, with_numbers(left, checkpoint, ratio, where).multiple_of) for ratio in ratios]
        told.append(f"{where}: multiple_of is {', '.join(f'{multiple} at {ratio:g}' for ratio, multiple in multiples)}")
    stays_plain = KV_GROUPS in left.structures and left.allocation in ("plain", "local")
    if family.model_type in _HEADS_SHARE_HIDDEN_SIZE and stays_plain:
        told.append(
            f"{where}: where KV groups go, vLLM and SGLang can't load the checkpoint, as they compute the size of "
            f"{family.model_type}'s heads from their number; for them, leave kv_groups out of structures"
        )
    return told


def planned_sizes(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> dict[str, str]:
    """``sizes_of`` the shapes that a method may make of a model, and a ``note`` on what decides among them.

    Raises:
        UserError: as ``check_ratios``.
    """
    settled = with_numbers(method, checkpoint, ratio, where)
    target = Target.of(checkpoint, settled, ratio, where)
    shapes = shapes_for(target)
    if not shapes:
        decides = "a search decides" if target.allocation == "searched" else "scores decide"
        stay = [name for name, it in (("KV heads", KV_GROUPS), ("layers", LAYERS)) if it not in target.structures]
        known = {name: size for name, size in sizes_of(checkpoint).items() if name in stay}
        return known | {"note": f"{decides}, layer by layer"}
    ranks = (f"{rank_field(name)} {row[0]}" for name, row in shapes[0].ranks.items())
    several = f"the closest of {len(shapes)} shapes, by measurement" if len(shapes) > 1 else ""
    return sizes_of(checkpoint, shapes) | {"note": several or ", ".join(ranks)}


def sizes_of(checkpoint: Checkpoint, shapes: Iterable[Shape] = ()) -> dict[str, str]:
    """Sizes of shapes of a model, or of the model as it is: a number, or the smallest and the largest of them."""
    shapes = list(shapes) or [Shape(tuple(range(checkpoint.num_layers)))]
    units = checkpoint.units
    sizes = {
        "width": [count // units.copies for shape in shapes for count in shape.counts(units) if count],
        "KV heads": [count for shape in shapes for count in shape.counts(checkpoint.structures[KV_GROUPS])],
        "layers": [len(shape.layers) for shape in shapes],
    }
    if EXPERTS in checkpoint.structures:
        experts = checkpoint.structures[EXPERTS]
        sizes["experts"] = [count for shape in shapes for count in shape.counts(experts) if count]
    ratios = [checkpoint.parameter_counts.ratio(shape) for shape in shapes]
    return {name: _span(row, "d") for name, row in sizes.items()} | {"ratio": _span(ratios, ".4f")}


def _span(numbers: Sequence[float], form: str) -> str:
    least, most = format(min(numbers), form), format(max(numbers), form)
    return least if least == most else f"{least}-{most}"

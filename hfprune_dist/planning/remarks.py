"""What planning tells: texts with which results mislead, what a method does to a model, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import DATA_SET_KEYS, TextSource
from hfprune_dist.config.texts import FIRST
from hfprune_dist.planning.methods import can_do, suited, why_groups_stay, why_not
from hfprune_dist.planning.ratios import with_numbers
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.planning.target import Target
from hfprune_dist.structures import EXPERTS, KV_GROUPS
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.low_rank import rank_field


def remarks_on_texts(config: SweepConfig, methods: Mapping[str, Method]) -> list[str]:
    """Sentences about texts for comparison that models are also made on, which misleads."""
    made_on: dict[str, TextSource] = {}
    if config.importance.criteria or any(method.prunes_in == "calibration" for method in methods.values()):
        mixture = config.calibration.mixture
        made_on |= {f"calibration.mixture.{n}": text for n, text in enumerate(mixture or [])}
        made_on |= {} if mixture else {"calibration": config.calibration}
    trainings = {f"recovery {name}": each for name, each in config.recovery.trainings().items() if each is not None}
    made_on |= {name: training for name, training in trainings.items() if training.text != "calibration"}
    compared_on = config.evaluation.fidelity.texts or {FIRST: config.evaluation.fidelity}
    return [
        f"{f'evaluation.fidelity.texts.{name}' if name else 'evaluation.fidelity'} and {other} read the same text: "
        "pruned models seem closer to the dense model on it than they are on unseen text"
        for name, held_out in compared_on.items()
        for other, text in made_on.items()
        if _overlap(text, held_out)
    ]


def _overlap(one: TextSource, other: TextSource) -> bool:
    """Whether two sources are the same, or one is a file in the other's folder."""
    if one.path is None or other.path is None:
        return all(getattr(one, key) == getattr(other, key) for key in ("path", "dataset", *DATA_SET_KEYS))
    first, second = Path(one.path).resolve(), Path(other.path).resolve()
    return first == second or first.parent == second or second.parent == first


def remarks_on_method(checkpoint: Checkpoint, method: Method, where: str) -> list[str]:
    """Sentences about what a method does otherwise on a model, or that it is left out."""
    if not can_do(method, checkpoint):
        return [f"{where}: left out, since the model {next(why_not(method, checkpoint))}"]
    family, left, stay = checkpoint.family, suited(method, checkpoint), why_groups_stay(method, checkpoint)
    told = [f"{where}: KV groups stay: {stay}"] if left.structures != method.structures else []
    return told + ([f"{where}: refit is {left.refit}: {family.no_sequence}"] if left.refit != method.refit else [])


def planned_sizes(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> dict[str, str]:
    """``sizes_of`` the shapes that a method may make of a model, and a ``note`` on what decides among them; a ratio
    that it can't reach is refused.
    """
    target = Target.from_settings(checkpoint, with_numbers(method, checkpoint), ratio, where)
    shapes = shapes_for(target)
    if not shapes:
        decides = "a search decides" if target.allocation == "searched" else "scores decide"
        return {"note": f"{decides}, layer by layer"}
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

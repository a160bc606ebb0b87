"""Students: models without neurons that one criterion chooses, in which another criterion computes its scores."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.importance import StudentParameters
from hfprune_dist.methods.sdmprune import PUBLISHED, lacking
from hfprune_dist.planning.shape_target import target_of
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.structures import NEURONS


def student_of(method: Method, ratio: float) -> StudentParameters | None:
    """The settings of a method's student; None if its criterion needs none. What the method leaves open is as
    published for the nearest ratio (of two equally near ones, the smaller).
    """
    if method.student_chosen_by is None:
        return None
    share, temperature = PUBLISHED[min(PUBLISHED, key=lambda it: (round(abs(it - ratio), 12), it))]
    return StudentParameters(
        lacks=method.student_lacks,
        teacher_share=share if method.teacher_share is None else method.teacher_share,
        teacher_temperature=temperature if method.teacher_temperature is None else method.teacher_temperature,
    )


def check_student(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> None:
    """Refuse a ratio at which some neurons without a score would stay: those that the student lacks.

    Args:
        method: with numbers, as ``with_numbers`` returns it.

    Raises:
        UserError: stating how much the student lacks; or as ``shapes_for`` does.
    """
    if method.student_chosen_by is None:
        return
    counts = checkpoint.units.counts
    lacks = [lacking(count, method.student_lacks) for count in counts]
    least = sum(lacks) * checkpoint.parameters_per_unit / checkpoint.parameters
    if ratio < least:
        raise UserError(
            f"{where}: ratio {ratio:g} removes less than the student of {method.criterion} lacks, which is "
            f"{method.student_lacks:g} of the neurons or {least:.4f} of all parameters; use a larger ratio or a "
            "smaller prune.student_lacks"
        )
    shapes = shapes_for(target_of(method, checkpoint, ratio, where), method)
    widths = shapes[0].units[NEURONS] if len(shapes) == 1 else counts  # else scores or measurements decide
    for count, width, missing in zip(counts, widths, lacks, strict=True):
        if 0 < count - width < missing:
            raise UserError(
                f"{where}: at ratio {ratio:g}, with widths that are multiples of {method.multiple_of}, layers lose "
                f"{count - width} of {count} neurons, fewer than the {missing} that the student of {method.criterion} "
                "lacks; use a larger ratio or a smaller prune.multiple_of or prune.student_lacks"
            )

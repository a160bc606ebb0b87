"""Students: models without neurons that one criterion chooses, in which another criterion computes its scores."""

from __future__ import annotations

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.importance import StudentParameters
from hfprune_dist.methods.sdmprune import LACKS, PUBLISHED, lacking


def student_of(method: Method, ratio: float) -> StudentParameters | None:
    """The settings of a method's student, as published for the nearest ratio (of two equally near ones, the smaller);
    None if its criterion needs none.
    """
    if method.student_chosen_by is None:
        return None
    share, temperature = PUBLISHED[min(PUBLISHED, key=lambda published: (round(abs(published - ratio), 12), published))]
    return StudentParameters(lacks=LACKS, teacher_share=share, teacher_temperature=temperature)


def check_student(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> None:
    """Refuse a ratio at which some neurons without a score would stay: those that the student lacks.

    Raises:
        UserError: stating how much the student lacks.
    """
    if method.student_chosen_by is None:
        return
    lacks = sum(lacking(count, LACKS) for count in checkpoint.units.counts)
    least = lacks * checkpoint.parameters_per_unit / checkpoint.parameters
    if ratio < least:
        raise UserError(
            f"{where}: ratio {ratio:g} removes less than the student of {method.criterion} lacks, which is "
            f"{LACKS:g} of the neurons or {least:.4f} of all parameters; use a larger ratio"
        )

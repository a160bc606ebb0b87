"""What a stage would refuse after the hours that others take before it, refused before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hfprune_dist.config import SweepConfig, TextSource
from hfprune_dist.data.text import require_fields
from launch.local import ranks_here
from launch.profiles import Profile


def check_stages(config: SweepConfig, todo: Sequence[str], profile: Profile | None) -> None:
    """Check what missing stages will read, and whether their ranks can share it.

    Args:
        todo: ids of the stages.
        profile: of the cluster where they run; None: this machine.

    Raises:
        UserError: for a text without the fields that are named, a batch that ranks can't share, or an unknown task.
    """
    kinds = {stage_id.partition("/")[0] for stage_id in todo}
    _check_texts(config, kinds)
    if "recover" in kinds:
        ranks = profile.resources["recover"].ranks if profile else ranks_here(config.runtime)
        config.recovery.require_shared_evenly(ranks)
    if config.evaluation.tasks and "evaluate" in kinds:
        from hfprune_dist.evaluation import check_tasks  # lm-eval takes seconds to import

        include_path = config.evaluation.include_path
        check_tasks(config.evaluation.tasks, Path(include_path) if include_path else None)


def _check_texts(config: SweepConfig, kinds: set[str]) -> None:
    calibration, fidelity, recovery = config.calibration, config.evaluation.fidelity, config.recovery
    read: dict[str, tuple[TextSource, list[str]]] = {
        "importance": (calibration, [calibration.text_field]),
        "reference": (fidelity, [fidelity.text_field]),
        "recover": (recovery, [recovery.instruction_field, recovery.response_field]),
    }
    for kind, (source, fields) in read.items():
        if kind in kinds and source.path is not None:
            require_fields(source.model_dump(), Path(source.path), fields)

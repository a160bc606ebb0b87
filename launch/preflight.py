"""Checks before anything runs, for input that a stage would otherwise refuse only after hours of other stages' work."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hfprune_launch.local.hardware import ranks_here
from hfprune_launch.slurm.profile import Profile

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import EvaluationConfig, RuntimeConfig, SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.data.text import Beginning, read_beginning, require_data_set
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import parameters_of
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.machine import count_gpus
from hfprune_dist.store.stage import RECOVERING


@dataclass(frozen=True)
class Reading:
    """A text that stages will read.

    Attributes:
        section: section of the configuration that describes it.
        sequence_length: tokens per window, or per row of pairs.
        where: name of the text in the stages' messages.
        beginning: its first texts; None if they come from the hub.
        windows: number of windows that are cut from the text; 0 if it is pairs to train on.
        add_bos_token: whether windows begin with BOS.
    """

    section: str
    sequence_length: int
    where: str
    beginning: Beginning | None
    windows: int = 0
    add_bos_token: bool = False


def check_stages(
    config: SweepConfig,
    plan: Plan,
    todo: Sequence[str],
    profile: Profile | None,
    *,
    absent: Collection[Path] = (),
    looks_only: bool = False,
) -> list[str]:
    """Before any missing stage runs, check what the stages will read for every model, and that ranks can share it.

    Returns sentences about what they read that are no reason to refuse it.

    Args:
        todo: ids of the stages.
        profile: profile of the cluster on which they run; None for this machine.
        absent: folders that stand for models of the hub which aren't downloaded, in a dry run.
        looks_only: whether it is one, which asks for no data sets.

    Raises:
        UserError: for GPUs that torch can't use, a tracker that isn't installed, a text or data set that can't be read,
            a text that is too short, a batch that ranks can't share, an unknown task, or a model with unsuitable
            tokenizer, chat template, weights or positions.
    """
    if todo and profile is None:
        _check_gpus()
    if {*RECOVERING, "distill"} & {plan.stages[stage_id].kind for stage_id in todo}:
        _check_trackers(config.runtime)
    models = _models_by_kind(plan, todo)
    readings = {kind: list(_texts(config, kind, looks_only)) for kind in models}
    for kind in RECOVERING & models.keys():
        ranks = profile.resources[kind].ranks if profile else ranks_here(config.runtime)
        config.recovery.require_shared_evenly(ranks)
    if config.evaluation.tasks and "evaluate" in models:
        _check_tasks(config.evaluation, looks_only)
    remarks: list[str] = []
    for folder in dict.fromkeys(it for folders in models.values() for it in folders if it not in absent):
        kinds = [kind for kind, folders in models.items() if folder in folders]
        of_folder = [it for kind in kinds for it in readings[kind]]
        remarks += _check_model(config, folder, of_folder, "evaluate" in kinds)
    return list(dict.fromkeys(remarks))


def _check_gpus() -> None:
    if count_gpus():
        from hfprune_dist.distributed.world import require_usable_gpus  # torch takes seconds to import

        require_usable_gpus()


def _check_tasks(evaluation: EvaluationConfig, looks_only: bool) -> None:
    from hfprune_dist.evaluation.lm_eval_tasks import check_tasks  # lm-eval takes seconds to import

    include_path = Path(evaluation.include_path) if evaluation.include_path else None
    check_tasks(evaluation.tasks, include_path, data=not looks_only)


def _check_trackers(runtime: RuntimeConfig) -> None:
    for tracker in runtime.report_to:
        if find_spec(tracker) is None:
            raise UserError(
                f"runtime.report_to: {tracker} is not installed; `pip install {tracker}`, or leave it out of the list"
            )


def _models_by_kind(plan: Plan, todo: Sequence[str]) -> dict[str, list[Path]]:
    """Kind of stage -> folders of the dense models whose tokenizers it needs, for these and models pruned from them."""
    models: dict[str, list[Path]] = {}
    for stage in (plan.stages[stage_id] for stage_id in todo):
        if parameters_of(stage).tokenizes:
            models.setdefault(stage.kind, []).append(plan.dense_folder(stage))
    return models


def _texts(config: SweepConfig, kind: str, looks_only: bool) -> Iterator[Reading]:
    """The texts that stages of a kind will read, among those that are checked here."""
    calibration, evaluation, recovery = config.calibration, config.evaluation, config.recovery
    if kind == "importance":
        for share in calibration.shares():
            place = _begin("calibration", share.text, [share.text.text_field], looks_only)
            sizes = share.windows, config.calibrates_with_bos
            yield Reading("calibration", calibration.sequence_length, *place, *sizes)
    if kind == "reference":
        for text in evaluation.fidelity.each().values():
            place = _begin("fidelity", text, [text.text_field], looks_only)
            yield Reading("evaluation.fidelity", text.sequence_length, *place, text.windows, evaluation.add_bos_token)
    if kind in RECOVERING:
        place = _begin("recovery", recovery, recovery.pair_fields, looks_only, recovery.samples)
        yield Reading("recovery", recovery.sequence_length, *place)


def _begin(
    where: str, source: TextSource, fields: Sequence[str], looks_only: bool, records: int | None = None
) -> tuple[str, Beginning | None]:
    """The name of a text in messages, and its first records; of a data set on the hub, whether it can be read."""
    if source.path is not None:
        return f"{where} {source.path}", read_beginning(Path(source.path), fields, where, records)
    if not looks_only:
        require_data_set(source.model_dump())
    return where, None


def _check_model(config: SweepConfig, folder: Path, readings: Sequence[Reading], evaluates: bool) -> list[str]:
    # These import torch and transformers, which takes seconds.
    from hfprune_dist.data.tokenizer import load_tokenizer, require_chat, require_embedded
    from hfprune_dist.models.loading import require_own_weights

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns when stages are started from here
    checkpoint = open_checkpoint(folder)
    require_own_weights(checkpoint)
    tokenizer = load_tokenizer(folder)
    require_embedded(tokenizer, checkpoint.config["vocab_size"], folder)
    if evaluates and config.evaluation.tasks and config.evaluation.apply_chat_template:
        require_chat(tokenizer, folder)
    for reading in readings:
        _check_length(reading, folder, checkpoint.max_positions)
    return [remark for reading in readings if (remark := _check_text(reading, folder, tokenizer))]


def _check_length(reading: Reading, folder: Path, positions: int | None) -> None:
    length = reading.sequence_length
    if positions is not None and length > positions:
        raise UserError(
            f"{reading.section}.sequence_length {length} is more than the {positions} positions of the model in "
            f"{folder} (max_position_embeddings); choose a smaller one"
        )


def _check_text(reading: Reading, folder: Path, tokenizer: Any) -> str | None:
    """Check that the part of a text that was read holds its windows, or a pair to train on; return a remark on it."""
    from hfprune_dist.data.instructions import check_pairs
    from hfprune_dist.data.tokenizer import require_eos
    from hfprune_dist.data.windows import Sampling, check_length

    length, beginning = reading.sequence_length, reading.beginning
    if not reading.windows:
        require_eos(tokenizer, folder)
        if beginning is not None:
            check_pairs(beginning, tokenizer, length, reading.where)
    elif beginning is not None:
        sampling = Sampling(reading.windows, length, seed=0, add_bos_token=reading.add_bos_token)
        return check_length(beginning, tokenizer, sampling, reading.where)
    return None

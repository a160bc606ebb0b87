"""Checks before anything runs, for input that a stage would otherwise refuse only after hours of other stages' work."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hfprune_launch.local.hardware import ranks_here
from hfprune_launch.slurm.profile import Profile

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.data.text import Beginning, read_beginning, require_data_set
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import parameters_of
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.machine import count_gpus
from hfprune_dist.store.stage import RECOVERING


class Text(NamedTuple):
    """A text that stages will read.

    Attributes:
        section: section of the configuration that describes it.
        where: name of the text in the stages' messages.
        beginning: its first texts; None if they come from the hub.
        sequence_length: tokens per window, or per row of pairs.
        windows: number of windows that are cut from the text; 0 if it is pairs to train on.
        add_bos_token: whether windows begin with BOS.
    """

    section: str
    where: str
    beginning: Beginning | None
    sequence_length: int
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
) -> None:
    """Before any missing stage runs, check what the stages will read for every model, and that ranks can share it.

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
    stages = [plan.stages[stage_id] for stage_id in todo]
    kinds = {stage.kind for stage in stages}
    evaluation = config.evaluation
    if stages and profile is None and count_gpus():
        from hfprune_dist.distributed.world import require_usable_gpus  # torch takes seconds to import

        require_usable_gpus()
    for tracker in config.runtime.report_to if {*RECOVERING, "distill"} & kinds else ():
        if find_spec(tracker) is None:
            raise UserError(
                f"runtime.report_to: {tracker} is not installed; `pip install {tracker}`, or leave it out of the list"
            )
    for kind in RECOVERING & kinds:
        ranks = profile.resources[kind].ranks if profile else ranks_here(config.runtime)
        config.recovery.require_shared_evenly(ranks)
    texts = list(_texts(config, kinds, looks_only))
    if evaluation.tasks and "evaluate" in kinds:
        from hfprune_dist.evaluation.lm_eval_tasks import check_tasks  # lm-eval takes seconds to import

        include_path = Path(evaluation.include_path) if evaluation.include_path else None
        check_tasks(evaluation.tasks, include_path, data=not looks_only)
    needs_chat = bool(evaluation.tasks) and evaluation.apply_chat_template and "evaluate" in kinds
    # Tokenizers of dense models are those of the models pruned from them, too.
    folders = dict.fromkeys(plan.dense_folder(stage) for stage in stages if parameters_of(stage).tokenizes)
    for folder in (folder for folder in folders if folder not in absent):
        _check_model(folder, texts, needs_chat)


def _texts(config: SweepConfig, kinds: Collection[str], looks_only: bool) -> Iterator[Text]:
    """The texts that stages of these kinds will read, among those that are checked here."""

    def begin(
        where: str, source: TextSource, fields: Sequence[str], records: int | None = None
    ) -> tuple[str, Beginning | None]:
        """Return the name of a text in messages, and its first records; a data set of the hub has to be there."""
        if source.path is not None:
            return f"{where} {source.path}", read_beginning(Path(source.path), fields, where, records)
        if not looks_only:
            require_data_set(source.model_dump())
        return where, None

    calibration, evaluation, recovery = config.calibration, config.evaluation, config.recovery
    for share in calibration.shares() if "importance" in kinds else ():
        place = begin("calibration", share.text, [share.text.text_field])
        yield Text("calibration", *place, calibration.sequence_length, share.windows, config.calibrates_with_bos)
    for text in evaluation.fidelity.each().values() if "reference" in kinds else ():
        place = begin("fidelity", text, [text.text_field])
        yield Text("evaluation.fidelity", *place, text.sequence_length, text.windows, evaluation.add_bos_token)
    if RECOVERING & {*kinds}:
        place = begin("recovery", recovery, recovery.pair_fields, recovery.samples)
        yield Text("recovery", *place, recovery.sequence_length)


def _check_model(folder: Path, texts: Sequence[Text], needs_chat: bool) -> None:
    """Check a model's tokenizer and weights, and that each text holds a window, or a pair to train on."""
    # These import torch and transformers, which takes seconds.
    from hfprune_dist.data.instructions import check_pairs
    from hfprune_dist.data.tokenizer import load_tokenizer, require_chat, require_embedded, require_eos
    from hfprune_dist.data.windows import Sampling, check_length
    from hfprune_dist.models.loading import require_own_weights

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns when stages are started from here
    checkpoint = open_checkpoint(folder)
    require_own_weights(checkpoint)
    tokenizer: Any = load_tokenizer(folder)
    require_embedded(tokenizer, checkpoint.config["vocab_size"], folder)
    if needs_chat:
        require_chat(tokenizer, folder)
    for text in texts:
        if checkpoint.max_positions is not None and text.sequence_length > checkpoint.max_positions:
            raise UserError(
                f"{text.section}.sequence_length {text.sequence_length} is more than the {checkpoint.max_positions} "
                f"positions of the model in {folder} (max_position_embeddings); choose a smaller one"
            )
    for text in texts:
        if not text.windows:
            require_eos(tokenizer, folder)
            if text.beginning is not None:
                check_pairs(text.beginning, tokenizer, text.sequence_length, text.where)
        elif text.beginning is not None:
            sampling = Sampling(text.windows, text.sequence_length, seed=0, add_bos_token=text.add_bos_token)
            check_length(text.beginning, tokenizer, sampling, text.where)

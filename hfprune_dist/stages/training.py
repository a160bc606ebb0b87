"""LoRA training in a stage: distillation, recovery and LoRAPrune differ in rows, in the loss, and in what is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.checkpoints.token_costs import training_cost
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.training import LoraTraining, rows_trained
from hfprune_dist.data.instructions import (
    PackedRows,
    Pair,
    encode_pairs,
    nothing_to_train_on,
    prompt_for,
    read_counts,
    save_rows,
)
from hfprune_dist.data.schedule import RowReader, Schedule
from hfprune_dist.data.text import read_texts
from hfprune_dist.data.tokenizer import load_tokenizer, require_eos
from hfprune_dist.kinds.training import DistillParameters, RecoverParameters
from hfprune_dist.stages.context import Context
from hfprune_dist.store.hashing import FileHashes, digest_of
from hfprune_dist.store.stage import STAGE_VERSIONS
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.training.fine_tuning import FineTuning
from hfprune_dist.training.snapshots import Snapshot
from hfprune_dist.training.trainer import fine_tune
from hfprune_dist.training.write_merged import write_merged, write_trained

PAIRS_AT_ONCE = 2000
# The settings that decide what is in the packed rows.
ROW_SETTINGS = {*TextSource.model_fields, "instruction_field", "response_field", "samples", "sequence_length"}


def train(
    context: Context[DistillParameters] | Context[RecoverParameters],
    checkpoint: Checkpoint,
    settings: LoraTraining,
    rows: RowReader,
    schedule: Schedule,
    *,
    section: str,
    total_steps: int,
    warmup_steps: int,
    distills: bool = False,
    masked_to: Shape | None = None,
) -> Snapshot:
    """Train LoRA, or resume where an earlier attempt was interrupted; see ``FineTuning``."""
    runtime = context.runtime
    task = FineTuning(
        checkpoint=checkpoint,
        section=section,
        settings=settings,
        seed=context.params.seed,
        rows=rows,
        distills=distills,
        schedule=schedule,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        save_every_steps=runtime.save_every_steps,
        timeout_minutes=runtime.collective_timeout_minutes,
        run_folder=context.run_folder,
        report_to=runtime.report_to,
        sharding=runtime.sharding,
        masked_to=masked_to,
    )
    return fine_tune(task, context.work / "snapshots", context.world, context.progress, context.interruption)


def write_model(
    context: Context[Any], checkpoint: Checkpoint, settings: LoraTraining, trained: Snapshot, kept: Kept | None = None
) -> Path:
    """Write a Hugging Face folder with what was learnt merged in, ``adapter/`` and ``loss.jsonl``; return the draft.

    Args:
        kept: the units that stay after merging, also written to ``kept.json``; None for all of them.
    """
    draft = context.open_draft()
    context.world.on_rank0(lambda: write_trained(checkpoint, trained, settings, draft))
    write_merged(checkpoint, draft, context.world, context.progress, kept)
    return draft


def train_on_instructions(
    context: Context[RecoverParameters], checkpoint: Checkpoint, masked_to: Shape | None = None
) -> tuple[Snapshot, dict[str, Any]]:
    """Prepare the rows, and train on them.

    Args:
        masked_to: the units that are to be left of the model at the end; None for all.

    Returns:
        what was learnt, and metrics for the manifest.
    """
    settings = context.params.recovery
    settings.require_shared_evenly(context.world.size)
    file = context.world.on_rank0(lambda: prepare_rows(context, checkpoint))
    counts = read_counts(file)
    schedule = Schedule(counts.rows, settings.batch_size, context.params.seed)
    steps = settings.steps(schedule.steps_per_epoch)
    trained = train(
        context,
        checkpoint,
        settings,
        PackedRows(file),
        schedule,
        section="recovery",
        total_steps=steps,
        warmup_steps=settings.warmup_steps,
        masked_to=masked_to,
    )
    rows = rows_trained(counts.rows, settings.batch_size, steps)
    cost = training_cost(checkpoint, rows, settings.sequence_length)
    return trained, {**asdict(counts), **trained.metrics(), **cost}


def prepare_rows(context: Context[RecoverParameters], checkpoint: Checkpoint) -> Path:
    """Tokenize and pack pairs once for all stages of a store that have the same rows; on rank 0.

    A file that is damaged is set aside and made again.
    """
    file = context.store.root / "rows" / _name_of_rows(context, checkpoint)
    if not is_usable(file):
        settings, tokenizer = context.params.recovery, load_tokenizer(checkpoint.path)
        require_eos(tokenizer, checkpoint.path)
        encoded = _encode(context, tokenizer)
        context.require_untouched_inputs()
        own, shares = context.work / "rows.safetensors", checkpoint.family.keeps_apart
        save_rows(own, encoded, settings.sequence_length, tokenizer.eos_token_id, context.params.seed, shares=shares)
        file.parent.mkdir(exist_ok=True)
        own.replace(file)  # another stage may do the same at this moment, with the same bytes
    return file


def _name_of_rows(context: Context[RecoverParameters], checkpoint: Checkpoint) -> str:
    """File name of the packed rows, made from what they depend on: pairs, how they are cut, the tokenizer's files."""
    content = {
        "version": STAGE_VERSIONS["recover"],
        "settings": context.params.recovery.model_dump(include=ROW_SETTINGS, exclude={"path"}),
        "seed": context.params.seed,
        "instructions": context.stage.inputs["instructions"].identity if context.has_input("instructions") else None,
        "architecture": checkpoint.config["model_type"],  # transformers chooses the tokenizer's class by it
        "several_to_a_row": checkpoint.family.keeps_apart,
        "tokenizer": FileHashes(None).of_files(checkpoint.path, checkpoint.tokenizer_files),
    }
    return f"{digest_of(content)[:20]}.safetensors"


def _encode(context: Context[RecoverParameters], tokenizer: Any) -> list[Pair | None]:
    """Tokenize all pairs.

    Raises:
        UserError: if none of them can be trained on.
    """
    settings = context.params.recovery
    path = context.own_file("instructions")
    texts = read_texts(settings.model_dump(), path, settings.pair_fields, context.params.seed, "recovery")
    pairs: Iterator[tuple[str, str]] = (
        (prompt_for(asked), answer) for asked, answer in islice(texts, settings.samples)
    )
    encoded: list[Pair | None] = []
    while some := list(islice(pairs, PAIRS_AT_ONCE)):
        encoded += encode_pairs(tokenizer, some, settings.sequence_length)
        done = len(encoded)
        context.progress.update("tokenizing pairs", done, settings.samples or done + len(some))
    if not any(encoded):
        where = f"recovery {path or settings.dataset}"
        raise nothing_to_train_on(len(encoded), settings.sequence_length, where)
    return encoded

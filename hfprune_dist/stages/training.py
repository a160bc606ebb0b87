"""LoRA training in a stage: distillation, recovery and LoRAPrune differ in rows, in the loss, and in what is left."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets, merge_weight_file, read_adapter, write_adapter
from hfprune_dist.checkpoints.pruned_config import pruned_config, write_kept
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.checkpoints.token_costs import training_cost
from hfprune_dist.checkpoints.write_pruned import write_companions
from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.training import LoraTraining, rows_trained
from hfprune_dist.data.examples import read_examples
from hfprune_dist.data.instructions import (
    EXAMPLES_AT_ONCE,
    Encoded,
    PackedRows,
    encode,
    require_trainable,
    save_rows,
)
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.data.tokenizer import load_tokenizer, require_eos
from hfprune_dist.distributed.world import World
from hfprune_dist.kinds.training import RecoverParameters
from hfprune_dist.stages.context import Context
from hfprune_dist.stages.shape_metrics import shape_metrics
from hfprune_dist.store.atomic_files import write_text
from hfprune_dist.store.hashing import FileHashes, digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.training.loraprune import UnitMasks
from hfprune_dist.training.snapshot import Snapshot
from hfprune_dist.training.trainer import FineTuning, fine_tune

TRACKING = "tracking"  # next to the store: a folder of its own for what each training tells trackers
LONGEST_TITLE = 96
ADAPTER_FOLDER, LOSSES = "adapter", "loss.jsonl"
# The settings that decide what is in the packed rows.
ROW_SETTINGS = {*TextSource.model_fields, "instruction_field", "response_field", "samples", "sequence_length"}


def train(context: Context[Any], task: FineTuning, metrics: Mapping[str, Any]) -> None:
    """Train LoRA, or resume where an earlier attempt was interrupted, and commit a Hugging Face folder with what was
    learnt merged in.

    Args:
        metrics: further ones for the manifest.
    """
    title = re.sub("[^A-Za-z0-9._]+", "-", f"{context.stage.label} {context.stage.kind}")[:LONGEST_TITLE]
    root = context.store.root
    run_folder = root.parent / TRACKING / f"{title}-{digest_of([context.stage.id, str(root.resolve())])[:8]}"
    surroundings = context.world, context.runtime, context.progress, context.interruption
    trained = fine_tune(task, *surroundings, context.work / "snapshot.safetensors", run_folder)
    losses = [line["loss"] for line in trained.losses]
    metrics = {**metrics, "steps": len(losses), "first_loss": losses[0], "final_loss": losses[-1]}
    kept, checkpoint = None, task.checkpoint
    if task.masked_to is not None:
        kept = UnitMasks(checkpoint.structures, task.masked_to, trained.tensors).kept()
        metrics |= shape_metrics(checkpoint, kept.shape, checkpoint.config)
    draft = context.open_draft()
    write_merged(checkpoint, trained, task.settings, draft, context.world, context.progress, kept)
    context.commit(draft, metrics)


def write_merged(
    checkpoint: Checkpoint,
    trained: Snapshot,
    settings: LoraTraining,
    draft: Path,
    world: World,
    progress: Progress,
    kept: Kept | None = None,
) -> None:
    """Write a Hugging Face folder with the checkpoint's layout and what was learnt merged in, and ``adapter/`` and
    ``loss.jsonl`` beside it. Each rank writes a share of the weight files.

    Args:
        kept: the units of all layers that stay after merging, also written to ``kept.json``; None for all of them.

    Raises:
        UserError: as ``merge_weight_file`` does.
    """

    def write_trained() -> None:
        targets = lora_targets(checkpoint.family, checkpoint.ranks)
        write_adapter(draft / ADAPTER_FOLDER, trained.weights, targets, settings.rank, settings.alpha)
        write_text(draft / LOSSES, "".join(json.dumps(line, allow_nan=False) + "\n" for line in trained.losses))

    def write_rest() -> None:
        config = checkpoint.config if kept is None else pruned_config(checkpoint, kept.shape)
        write_companions(checkpoint, draft, config)
        if kept is not None:
            write_kept(draft, kept)

    world.on_rank0(write_trained)
    adapter, files = read_adapter(draft / ADAPTER_FOLDER), checkpoint.weight_files
    for done, file in enumerate(files[world.rank :: world.size]):
        progress.update("merging", done * world.size, len(files))
        merge_weight_file(checkpoint, file, adapter, draft, kept)
    world.barrier()  # the rest describes all weight files
    world.on_rank0(write_rest)


# On instructions.


def train_on_instructions(
    context: Context[RecoverParameters], checkpoint: Checkpoint, masked_to: Shape | None = None
) -> None:
    """Prepare the rows, and train on them.

    Args:
        masked_to: the units that are to be left of the model at the end; None for all.
    """
    settings = context.params.recovery
    file = context.world.on_rank0(lambda: prepare_rows(context, checkpoint))
    rows = PackedRows(file)
    schedule = Schedule(rows.counts["rows"], settings.batch_size, context.params.seed)
    task = FineTuning(
        checkpoint=checkpoint,
        section="recovery",
        settings=settings,
        seed=context.params.seed,
        rows=rows,
        schedule=schedule,
        total_steps=settings.steps(schedule.steps_per_epoch),
        warmup_steps=settings.warmup_steps,
        masked_to=masked_to,
    )
    seen = rows_trained(schedule.rows, settings.batch_size, task.total_steps)
    train(context, task, {**rows.counts, **training_cost(checkpoint, seen, settings.sequence_length)})


def prepare_rows(context: Context[RecoverParameters], checkpoint: Checkpoint) -> Path:
    """Tokenize and pack examples once for all stages of a store that have the same rows; on rank 0.

    A file that is damaged is made again.
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
    """File name of the packed rows, made from what they depend on: data, how it is cut, the tokenizer's files."""
    content = {
        "version": KINDS["recover"].version,
        "settings": context.params.recovery.model_dump(include=ROW_SETTINGS, exclude={"path"}),
        "seed": context.params.seed,
        "instructions": context.stage.inputs["instructions"].identity if context.has_input("instructions") else None,
        "architecture": checkpoint.config["model_type"],  # transformers chooses the tokenizer's class by it
        "several_to_a_row": checkpoint.family.keeps_apart,
        "tokenizer": FileHashes(None).of_files(checkpoint.path, checkpoint.tokenizer_files),
    }
    return f"{digest_of(content)[:20]}.safetensors"


def _encode(context: Context[RecoverParameters], tokenizer: Any) -> list[Encoded | None]:
    """Tokenize all examples.

    Raises:
        UserError: if none of them can be trained on.
    """
    settings, path = context.params.recovery, context.own_file("instructions")
    examples = islice(read_examples(settings.model_dump(), path, context.params.seed), settings.samples)
    encoded: list[Encoded | None] = []
    while some := list(islice(examples, EXAMPLES_AT_ONCE)):
        encoded += encode(tokenizer, some, settings.sequence_length)
        done = len(encoded)
        context.progress.update("tokenizing", done, settings.samples or done + len(some))
    require_trainable(encoded, settings.sequence_length, f"recovery {path or settings.dataset}")
    return encoded

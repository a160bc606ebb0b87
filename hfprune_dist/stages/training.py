"""Training in a stage: recovery, and LoRAPrune, which prunes meanwhile."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets, merged, read_adapter, rounded, write_adapter
from hfprune_dist.checkpoints.pruned_config import pruned_config, write_kept
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.checkpoints.token_costs import training_flops
from hfprune_dist.checkpoints.write_pruned import write_companions, write_weight_file
from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.training import Training
from hfprune_dist.data.examples import read_examples
from hfprune_dist.data.instructions import (
    EXAMPLES_AT_ONCE,
    Encoded,
    PackedRows,
    encode,
    read_answers,
    require_trainable,
    save_rows,
)
from hfprune_dist.data.schedule import RowReader, Schedule
from hfprune_dist.data.tokenizer import load_tokenizer, require_eos
from hfprune_dist.data.windows import load_windows
from hfprune_dist.distributed.world import World
from hfprune_dist.kinds.answers import ANSWERS
from hfprune_dist.kinds.training import LOSSES, RecoverParameters
from hfprune_dist.stages.context import Context
from hfprune_dist.stages.shape_metrics import shape_metrics
from hfprune_dist.store.atomic_files import write_jsonl
from hfprune_dist.store.hashing import FileHashes, digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.training.loraprune import UnitMasks
from hfprune_dist.training.snapshot import Snapshot
from hfprune_dist.training.teacher_states import DenseStates
from hfprune_dist.training.trainer import FineTuning, fine_tune

TRACKING = "tracking"  # next to the store: a folder of its own for what each training tells trackers
LONGEST_TITLE = 96
ADAPTER_FOLDER = "adapter"


def train(context: Context[RecoverParameters], checkpoint: Checkpoint, masked_to: Shape | None = None) -> None:
    """Train, or resume where an earlier attempt was interrupted, and commit a Hugging Face folder with what was learnt.

    Args:
        masked_to: the units that are to be left of the model at the end; None for all.
    """
    settings, seed = context.params.recovery, context.params.seed
    teacher, head_of = (
        open_checkpoint(context.input_path(role)) if context.has_input(role) else None for role in ("dense", "head")
    )
    rows, counts = _rows(context, checkpoint)
    schedule = Schedule(counts["rows"], settings.batch_size, seed)
    task = FineTuning(
        checkpoint=checkpoint,
        settings=settings,
        seed=seed,
        rows=rows,
        schedule=schedule,
        total_steps=settings.steps(schedule.rows, schedule.steps_per_epoch, len(rows(0)["input_ids"])),
        teacher=teacher,
        head_of=head_of,
        held_out=DenseStates(context.input_path("held-out")) if context.has_input("held-out") else None,
        masked_to=masked_to,
    )
    title = re.sub("[^A-Za-z0-9._]+", "-", f"{context.stage.label} {context.stage.kind}")[:LONGEST_TITLE]
    root = context.store.root
    run_folder = root.parent / TRACKING / f"{title}-{digest_of([context.stage.id, str(root.resolve())])[:8]}"
    surroundings = context.world, context.runtime, context.progress, context.interruption
    began = time.monotonic()
    trained = fine_tune(task, *surroundings, context.work / "snapshot.safetensors", run_folder)
    earlier = trained.notes.pop("seconds") - (time.monotonic() - began)
    losses = [line["loss"] for line in trained.losses]
    flops = training_flops(checkpoint, task.tokens, in_place=settings.method != "lora", teacher=teacher)
    cost = {"training_tokens": task.tokens_at(trained.step), "flops_per_token": flops}
    summary = {"steps": len(losses), "first_loss": losses[0], "final_loss": losses[-1]}
    metrics = {**counts, **cost, **trained.notes, **summary}
    kept = None
    if masked_to is not None:
        kept = UnitMasks(checkpoint.structures, masked_to, trained.tensors).kept()
        metrics |= shape_metrics(checkpoint, kept.shape, checkpoint.config)
    draft = context.open_draft()
    write_trained(checkpoint, trained, settings, draft, context.world, context.progress, kept)
    context.commit(draft, metrics, earlier)


def write_trained(
    checkpoint: Checkpoint,
    trained: Snapshot,
    settings: Training,
    draft: Path,
    world: World,
    progress: Progress,
    kept: Kept | None = None,
) -> None:
    """Write a Hugging Face folder with the checkpoint's layout and what was learnt, ``loss.jsonl`` beside it and, of
    LoRA, which is merged into the weights, ``adapter/``. Each rank writes a share of the weight files.

    Args:
        kept: the units of all layers that stay after merging, also written to ``kept.json``; None for all of them.

    Raises:
        UserError: if a weight is not finite, or too large for its dtype.
    """

    def write_rest() -> None:
        write_jsonl(draft / LOSSES, trained.losses)
        config = checkpoint.config if kept is None else pruned_config(checkpoint, kept.shape)
        write_companions(checkpoint, draft, config)
        if kept is not None:
            write_kept(draft, kept)

    files, stays = checkpoint.weight_files, kept or Kept(tuple(range(checkpoint.num_layers)))
    if settings.method == "lora":
        folder, targets = draft / ADAPTER_FOLDER, lora_targets(checkpoint.family, checkpoint.ranks)
        world.on_rank0(lambda: write_adapter(folder, trained.weights, targets, settings.rank, settings.alpha))
        learnt = merged(checkpoint, read_adapter(folder), stays)
    else:
        learnt = _learnt_in_place(checkpoint, trained)
    for done, file in enumerate(files[world.rank :: world.size]):
        progress.update("merging", done * world.size, len(files))
        write_weight_file(checkpoint, file, stays, draft, learnt)
    world.barrier()  # the rest describes all weight files
    world.on_rank0(write_rest)


def _learnt_in_place(checkpoint: Checkpoint, trained: Snapshot) -> dict[str, Callable[[], Tensor]]:
    """Name of each weight that was trained itself, or is a copy of one -> what makes it."""
    family, names = checkpoint.family, {name: name for name in trained.shapes}
    is_tied = checkpoint.config["tie_word_embeddings"] and family.embedding_tensor in names
    if is_tied and family.head_tensor in checkpoint.tensors:  # a copy
        names[family.head_tensor] = family.embedding_tensor
    return {
        name: partial(lambda name, source: rounded(checkpoint, name, trained.weight(source)), name, source)
        for name, source in names.items()
    }


# Rows.


def _rows(context: Context[RecoverParameters], checkpoint: Checkpoint) -> tuple[RowReader, dict[str, int]]:
    """The rows to train on; and for the manifest, their number and what is in them."""
    if context.params.recovery.text != "calibration":
        rows = PackedRows(context.world.on_rank0(lambda: prepare_rows(context, checkpoint)))
        return rows, rows.counts
    windows_ST = load_windows(context.input_path("windows"))
    counts = {"rows": len(windows_ST), "windows": len(windows_ST), "tokens": windows_ST.numel()}
    if context.has_input("reference"):
        return DenseStates(context.input_path("reference")), counts
    return lambda row: {"input_ids": windows_ST[row], "labels": windows_ST[row].clone()}, counts


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
        if not is_usable(file):  # another stage may have made the same meanwhile; on NFS, its ranks would lose it
            own.replace(file)
    return file


def _name_of_rows(context: Context[RecoverParameters], checkpoint: Checkpoint) -> str:
    """File name of the packed rows, made from what they depend on: data, how it is cut, the tokenizer's files."""
    answers = context.input_if_any("answers")
    content = {
        "version": KINDS["recover"].version,
        "settings": {name: value for name, value in context.params.recovery.row_settings().items() if name != "path"},
        "seed": context.params.seed,
        "text": [source.identity for role, source in context.stage.inputs.items() if role == "text"],
        # Made again on a GPU, they may be others.
        "answers": answers and FileHashes(None).of_file(answers / ANSWERS),
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
    if answers := context.input_if_any("answers"):
        return read_answers(answers / ANSWERS)
    settings, path = context.params.recovery, context.input_if_any("text")
    examples = islice(read_examples(settings.model_dump(), path, context.params.seed), settings.samples)
    encoded: list[Encoded | None] = []
    left = settings.tokens if settings.text == "documents" and settings.tokens else math.inf
    done = 0
    while left > 0 and (some := list(islice(examples, EXAMPLES_AT_ONCE))):
        encoded += encode(tokenizer, some, settings.sequence_length)
        left -= sum(len(one.input_ids_T) for one in encoded[done:] if one is not None)
        done = len(encoded)
        context.progress.update("tokenizing", done, max(done, settings.samples or 0))
    require_trainable(encoded, settings.sequence_length, f"recovery {path or settings.dataset}")
    return encoded

"""Training on instruction pairs, shared by several stages: the rows, prepared once, and LoRA on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.tensor_files import is_usable
from hfprune_dist.checkpoints.token_costs import training_cost
from hfprune_dist.config.section import TextSource
from hfprune_dist.config.training import RecoveryConfig, rows_trained
from hfprune_dist.data.instructions import (
    PackedRows,
    Pair,
    RowCounts,
    encode_pairs,
    nothing_to_train_on,
    prompt_for,
    read_counts,
    save_rows,
)
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.data.text import read_texts
from hfprune_dist.data.tokenizer import load_tokenizer, require_eos
from hfprune_dist.kinds.loraprune import LoraPruneParameters
from hfprune_dist.kinds.recover import RecoverParameters
from hfprune_dist.stages.context import Context as AnyContext
from hfprune_dist.store.file_cache import FileCache
from hfprune_dist.store.hashing import FileHashes, digest_of
from hfprune_dist.store.stage import STAGE_VERSIONS
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.fine_tuning import FineTuning
from hfprune_dist.training.snapshots import Snapshot
from hfprune_dist.training.trainer import fine_tune

Context = AnyContext[RecoverParameters] | AnyContext[LoraPruneParameters]

ROWS = "rows.safetensors"
PAIRS_AT_ONCE = 2000
# The settings that decide what is in the packed rows.
ROW_SETTINGS = {*TextSource.model_fields, "instruction_field", "response_field", "samples", "sequence_length"}


@dataclass(frozen=True)
class Trained:
    """The result of training, counts of the rows that there were to train on, and what it cost."""

    rows: RowCounts
    last: Snapshot
    cost: dict[str, int]

    def metrics(self) -> dict[str, float | int]:
        """Metrics for a manifest."""
        return {**asdict(self.rows), **self.last.metrics(), **self.cost}


def train_on_instructions(context: Context, checkpoint: Checkpoint, masked_to: Shape | None = None) -> Trained:
    """Prepare the rows, then train LoRA on them, or resume where an earlier attempt was interrupted.

    Args:
        masked_to: the units that are to be left of the model at the end; None for all.
    """
    settings = context.params.recovery
    settings.require_shared_evenly(context.world.size)
    counts = prepare_rows(context, settings, checkpoint)
    last = _train(context, checkpoint, counts, masked_to)
    rows = rows_trained(counts.rows, settings.batch_size, len(last.losses))
    return Trained(counts, last, training_cost(checkpoint, rows, settings.sequence_length))


def prepare_rows(context: Context, settings: RecoveryConfig, checkpoint: Checkpoint) -> RowCounts:
    """Tokenize and pack pairs on rank 0, once for all attempts, and for all stages of the store with the same rows.

    Every rank trains on the file in the work folder; one that an earlier attempt left damaged is set aside.
    """
    file, cache = context.work / ROWS, FileCache(context.store.root / "rows")
    key = partial(_rows_key, context, settings, checkpoint)
    collected: list[_Collector] = []  # on rank 0, if rows are missing

    def collect() -> None:
        if not is_usable(file) and not cache.take(key(), file):
            collected.append(_Collector(context, settings, checkpoint))
            collected[0].take_all()

    def save() -> None:
        for collector in collected:
            collector.save(file)
            cache.put(key(), file)

    context.world.on_rank0(collect)
    context.require_untouched_inputs()
    context.world.on_rank0(save)
    return read_counts(file)


def _rows_key(context: Context, settings: RecoveryConfig, checkpoint: Checkpoint) -> str:
    """File name of the packed rows, made from what they depend on: pairs, how they are cut, the tokenizer's files."""
    hashes = FileHashes(None)
    content = {
        "version": STAGE_VERSIONS["recover"],
        "settings": settings.model_dump(include=ROW_SETTINGS, exclude={"path"}),
        "seed": context.params.seed,
        "instructions": context.stage.inputs["instructions"].identity if context.has_input("instructions") else None,
        "architecture": checkpoint.config["model_type"],  # transformers chooses the tokenizer's class by it
        "several_to_a_row": checkpoint.family.keeps_apart,
        "tokenizer": hashes.of_files(checkpoint.path, checkpoint.tokenizer_files),
    }
    return f"{digest_of(content)[:20]}.safetensors"


class _Collector:
    """Reads, tokenizes and packs the instruction pairs of a stage."""

    def __init__(self, context: Context, settings: RecoveryConfig, checkpoint: Checkpoint) -> None:
        path = context.input_path("instructions") if context.has_input("instructions") else None
        self._seed = context.params.seed
        self._settings = settings
        self._progress = context.progress
        self._where = f"recovery {path or settings.dataset}"
        self._shares = checkpoint.family.keeps_apart
        self._tokenizer = load_tokenizer(checkpoint.path)
        require_eos(self._tokenizer, checkpoint.path)
        self._texts = self._read_texts(path)
        self._encoded: list[Pair | None] = []

    def take_all(self) -> None:
        """Tokenize all pairs."""
        while texts := list(islice(self._texts, PAIRS_AT_ONCE)):
            self._encoded += encode_pairs(self._tokenizer, texts, self._settings.sequence_length)
            done = len(self._encoded)
            self._progress.update("tokenizing pairs", done, self._settings.samples or done + len(texts))

    def save(self, file: Path) -> None:
        """Pack the tokenized pairs and write them.

        Raises:
            UserError: if no pair can be trained on.
        """
        length = self._settings.sequence_length
        if not any(self._encoded):
            raise nothing_to_train_on(len(self._encoded), length, self._where)
        save_rows(file, self._encoded, length, self._tokenizer.eos_token_id, self._seed, shares=self._shares)

    def _read_texts(self, path: Path | None) -> Iterator[tuple[str, str]]:
        settings = self._settings
        texts = read_texts(settings.model_dump(), path, settings.pair_fields, self._seed, "recovery")
        for instruction, response in islice(texts, settings.samples):
            yield prompt_for(instruction), response


def _train(context: Context, checkpoint: Checkpoint, counts: RowCounts, masked_to: Shape | None) -> Snapshot:
    settings = context.params.recovery
    schedule = Schedule(counts.rows, settings.batch_size, context.params.seed)
    task = FineTuning(
        checkpoint=checkpoint,
        section="recovery",
        settings=settings,
        seed=context.params.seed,
        rows=PackedRows(context.work / ROWS),
        distills=False,
        schedule=schedule,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.steps(schedule.steps_per_epoch),
        save_every_steps=context.runtime.save_every_steps,
        timeout_minutes=context.runtime.collective_timeout_minutes,
        run_folder=context.run_folder,
        report_to=context.runtime.report_to,
        sharding=context.runtime.sharding,
        masked_to=masked_to,
    )
    return fine_tune(task, context.work / "snapshots", context.world, context.progress, context.interruption)

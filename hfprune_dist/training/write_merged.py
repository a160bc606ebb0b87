"""Merging a trained adapter into a checkpoint, on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets, merge_weight_file, read_adapter, write_adapter
from hfprune_dist.checkpoints.pruned_config import pruned_config, write_kept
from hfprune_dist.checkpoints.write_pruned import write_companions
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.distributed.world import World
from hfprune_dist.store.atomic_files import write_text
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.structures.kept import Kept
from hfprune_dist.training.snapshots import Snapshot

ADAPTER_FOLDER = "adapter"
LOSSES = "loss.jsonl"


def write_trained(checkpoint: Checkpoint, trained: Snapshot, settings: LoraTraining, draft: Path) -> None:
    """Write what was trained: ``adapter/`` and ``loss.jsonl``."""
    targets = lora_targets(checkpoint.family, checkpoint.ranks)
    write_adapter(draft / ADAPTER_FOLDER, trained.weights, targets, settings.rank, settings.alpha)
    write_text(draft / LOSSES, "".join(json.dumps(line, allow_nan=False) + "\n" for line in trained.losses))


def write_merged(
    checkpoint: Checkpoint, draft: Path, world: World, progress: Progress, kept: Kept | None = None
) -> None:
    """Write a Hugging Face folder with the checkpoint's layout, and the ``adapter/`` that rank 0 has written merged in.

    Each rank writes a share of the weight files.

    Args:
        kept: the units of all layers that stay after merging, also written to ``kept.json``; None for all of them.

    Raises:
        UserError: as ``merge_weight_file`` does.
    """
    adapter = read_adapter(draft / ADAPTER_FOLDER)
    files = checkpoint.weight_files
    for done, file in enumerate(files[world.rank :: world.size]):
        progress.update("merging", done * world.size, len(files))
        merge_weight_file(checkpoint, file, adapter, draft, kept)
    world.barrier()  # the rest describes all weight files

    def write_rest() -> None:
        config = checkpoint.config if kept is None else pruned_config(checkpoint, kept.shape)
        write_companions(checkpoint, draft, config)
        if kept is not None:
            write_kept(draft, kept)

    world.on_rank0(write_rest)

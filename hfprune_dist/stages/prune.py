"""Prune: rank 0 decides which neurons stay, all ranks check the decision and write the smaller checkpoint's files."""

from __future__ import annotations

from safetensors.torch import load_file
from torch import Tensor

from hfprune_dist.budget import uniform_width
from hfprune_dist.core.selection import top_neurons
from hfprune_dist.files import write_json
from hfprune_dist.identity import digest_of
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.models.surgery import mlp_cuts, write_companions, write_weight_file
from hfprune_dist.plan import size_of
from hfprune_dist.stages.context import Context


def run(context: Context) -> None:
    """Write a Hugging Face folder that plain transformers loads, and ``kept.json``: the neurons that stayed."""
    checkpoint = open_checkpoint(context.input_path("model"))
    kept, kept_hash = _decide(context, checkpoint)
    draft = context.open_draft()
    cuts = mlp_cuts(checkpoint, kept)
    files = checkpoint.weight_files
    for done, file in enumerate(files[context.world.rank :: context.world.size]):
        context.progress.update("files", done * context.world.size, len(files))
        write_weight_file(checkpoint, file, cuts, draft)
    context.world.barrier()
    width = len(kept[0])
    if context.world.is_first:
        write_companions(checkpoint, draft, {"intermediate_size": width})
        write_json(draft / "kept.json", {"layers": [row.tolist() for row in kept]})
    context.commit(draft, _metrics(checkpoint, width) | {"kept_sha256": kept_hash})


def _decide(context: Context, checkpoint: Checkpoint) -> tuple[list[Tensor], str]:
    """Select on rank 0, broadcast, and check that every rank holds the same indices."""
    kept = context.world.broadcast(_select(context, checkpoint) if context.world.is_first else [])
    kept_hash = digest_of([row.tolist() for row in kept])
    hashes = context.world.gather(kept_hash)
    assert len(set(hashes)) == 1, f"ranks disagree about the kept neurons: {hashes}"
    return kept, kept_hash


def _select(context: Context, checkpoint: Checkpoint) -> list[Tensor]:
    params = context.params
    width = uniform_width(size_of(checkpoint), params["ratio"], params["multiple_of"], context.stage.label)
    scores = load_file(context.input_path("importance") / "importance.safetensors")
    return [
        top_neurons(scores[f"layers.{layer}.{params['criterion']}"], width) for layer in range(checkpoint.num_layers)
    ]


def _metrics(checkpoint: Checkpoint, width: int) -> dict[str, float | int]:
    size = size_of(checkpoint)
    removed = checkpoint.num_layers * (checkpoint.intermediate_size - width) * checkpoint.parameters_per_neuron
    return {
        "ratio_reached": size.total_ratio(width),
        "parameters": checkpoint.parameters - removed,
        "intermediate_size": width,
    }

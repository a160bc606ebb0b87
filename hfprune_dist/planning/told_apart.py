"""Which models have the settings that tell results from those that earlier versions computed otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.told_apart import Adapted, PairsOfARow, Positions


def adapted_in(dense: Checkpoint) -> Adapted:
    """The setting of trainings of a model, and of those pruned from it."""
    return "attention of every kind" if dense.family.adapted_attention else None


def pairs_of_a_row(dense: Checkpoint) -> PairsOfARow:
    """The setting of fine-tunings of a model, and of those pruned from it, on instruction pairs."""
    family = dense.family
    # Its pairs have always been apart where some layers have no attention, for which it gets no low rank either.
    packed_once = family.model_type == "granitemoehybrid" and not family.no_low_rank
    return 1 if packed_once and not family.keeps_apart else None


def positions_read(dense: Checkpoint, tasks: Sequence[str]) -> Positions:
    """The setting of evaluations, on these tasks, of a model and of those pruned from it."""
    is_stretched = dense.max_positions != dense.config.get("max_position_embeddings")
    return "with those of rope scaling" if tasks and is_stretched else None

"""A second kind of unit, made up for tests: pairs of adjacent neurons that stay or go together."""

from dataclasses import dataclass

from hfprune_dist.checkpoints import checkpoint
from hfprune_dist.checkpoints.families import Family
from hfprune_dist.structures.units import Block, Owned, Units, read_counts

CHANNELS = 2


@dataclass(frozen=True)
class FamilyOfPairs(Family):
    def units(self, config):
        parts = [f"{self.mlp}.{name}.{part}" for name in self.row_projections for part in ("weight", "bias")]
        return Units(
            kind="neurons",  # the kind that they replace
            counts=read_counts(config, "intermediate_size", CHANNELS),
            rows=tuple(Owned(part, axis=0, per_unit=CHANNELS) for part in parts),
            output=f"{self.mlp}.{self.down_projection}",
            block=Block(self.layers, self.mlp, self.mlp_norm),
            channels_per_unit=CHANNELS,
            fields={"intermediate_size": CHANNELS},
        )


PAIRS = FamilyOfPairs("llama", "Llama")


def change_families(patch, change):
    """Let all checkpoints that are opened have families that are changed so."""
    original = checkpoint.discover

    def discover(*arguments, **options):
        family, stated = original(*arguments, **options)
        return change(family), stated

    patch.setattr(checkpoint, "discover", discover)

"""A second kind of unit, made up for tests: pairs of adjacent neurons that stay or go together."""

from dataclasses import dataclass, fields

from hfprune_dist.checkpoints.families import FAMILIES, Family
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


def prune_pairs(patch):
    """Let pruning remove pairs of neurons instead of single neurons, from models of every family."""
    for name, family in FAMILIES.items():
        pairs = FamilyOfPairs(**{field.name: getattr(family, field.name) for field in fields(family)})
        patch.setitem(FAMILIES, name, pairs)

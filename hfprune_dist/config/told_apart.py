"""Settings that tell results from those that earlier versions computed otherwise.

Only models for which it makes a difference have them: of all others, a store keeps its results.
"""

from __future__ import annotations

from typing import Annotated, Literal

from hfprune_dist.config.left_out import LeftOutAt

# What LoRA adapts, where early versions adapted other layers, since they went by the names of one kind of attention's
# projections (see ``Family.adapted_attention``).
Adapted = Annotated[Literal["attention of every kind"] | None, LeftOutAt(None)]
# How many pairs share a row, where earlier versions packed several, which saw each other (see ``Family.keeps_apart``).
PairsOfARow = Annotated[Literal[1] | None, LeftOutAt(None)]
# The longest sequence that lm-eval lets a model read, where earlier versions left out what rope scaling adds (see
# ``Checkpoint.max_positions``).
Positions = Annotated[Literal["with those of rope scaling"] | None, LeftOutAt(None)]

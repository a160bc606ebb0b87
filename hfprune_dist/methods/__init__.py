"""The methods: each module reads as its paper, and declares the criteria that the paper has.

``CRITERIA`` is the table of those that the calibration pass computes. ``lorap`` scores units while it prunes, and
``loraprune`` while it trains; these two import torch, the others only in functions (``core.criterion``).
"""

from typing import TYPE_CHECKING, Literal

from hfprune_dist.core.criterion import Criterion
from hfprune_dist.methods import baselines, flap, hfprune, llm_pruner, reap, sdmprune, surgeon, wanda_sp

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for method in (hfprune, llm_pruner, surgeon, flap, wanda_sp, sdmprune, reap, baselines)
    for criterion in method.CRITERIA
}
# Criteria by which the prune stage itself scores neurons, layer by layer, in the model as pruned so far.
SCORED_WHILE_PRUNED = ("lorap",)

# Types of the names of those, and of all criteria that a method can use, for configurations.
if TYPE_CHECKING:
    CriterionName = str
    MethodCriterion = str
else:
    CriterionName = Literal[tuple(CRITERIA)]
    MethodCriterion = Literal[(*CRITERIA, *SCORED_WHILE_PRUNED)]

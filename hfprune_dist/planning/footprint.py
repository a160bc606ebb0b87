"""Memory per GPU that a stage needs, from a model's dimensions.

Estimates, not measurements: they leave out fragmentation and the runtime's own buffers, for which ``RESERVE`` is kept
free. Each kind of job has a module of its own.
Torch-free, so that a login node answers at once.
"""

from __future__ import annotations

from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.generation_footprint import Generate
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.importance_footprint import Importance
from hfprune_dist.planning.layer_pass_footprint import LowRank, Reference, Refit
from hfprune_dist.planning.training_footprint import Train

# Share of a GPU's memory that is kept free for the runtime's context, communication buffers and fragmentation.
RESERVE = 0.1

# Jobs of a whole model, in micro-batches.
BatchedJob = Importance | Train | Evaluate
# Jobs that hold one layer at a time on each rank.
LayerPass = Refit | LowRank | Reference
Job = BatchedJob | LayerPass | Generate


def fits(job: Job, dims: Dimensions, gpus: Gpus) -> bool:
    """Whether the job's peak leaves ``RESERVE`` of a GPU's memory free."""
    return job.memory(dims, gpus.ranks).total <= (1 - RESERVE) * gpus.memory

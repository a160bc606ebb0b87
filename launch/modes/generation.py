"""What generating costs where models are large: said before the first stage, and refused where it can't work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hfprune_launch.local.hardware import gpus_here, ranks_here
from hfprune_launch.slurm.estimate import GIB
from hfprune_launch.slurm.profile import Profile

from hfprune_dist.config.parameters import EfficiencyParameters, EvaluateParameters
from hfprune_dist.config.schema import RuntimeConfig, SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.planning.dimensions import Dimensions, checkpoint_dimensions
from hfprune_dist.planning.footprint import fits
from hfprune_dist.planning.generation_footprint import Generate, gathered_per_token
from hfprune_dist.planning.gpu_needs import ITEMSIZE, Gpus
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage


class Generation:
    """Stages in which models generate, of those that must run.

    Args:
        config: with the runtime that fits where stages run.
        todo: ids of the stages that must run.
        profile: of the cluster where they run; None: this machine.
    """

    def __init__(self, config: SweepConfig, plan: Plan, todo: Sequence[str], profile: Profile | None) -> None:
        self._config = config
        self._plan = plan
        self._stages = [plan.stages[stage_id] for stage_id in todo]
        self._profile = profile

    def remarks(self) -> Iterator[str]:
        """What it costs to generate with a model that is sharded, and what is not sharded at all, in sentences."""
        gathered = self._gathered()
        tasks = self._tasks() if gathered else []
        for model, (size, ranks) in gathered.items() if tasks else ():
            yield (
                f"{', '.join(tasks)}: the model generates, and {model} is sharded over {ranks} ranks (ZeRO-3), so that "
                f"each of them gathers all {size / 1e9:,.3g} GB of it for every token; where it fits on each GPU "
                "runtime.sharding replicate is much faster, else leave such tasks out"
            )
        if self._config.runtime.sharding == "zero3" and self._measurements():
            yield "efficiency is measured with whole models on rank 0, whatever runtime.sharding says"

    def require_room(self) -> None:
        """Check that rank 0 has room for both models whose efficiency it measures, where stages run on this machine.

        A profile's GPUs are checked with all that its stages need.

        Raises:
            UserError: naming the stage, what it needs and what helps.
        """
        gpus = gpus_here(self._config.runtime) if self._profile is None and self._measurements() else None
        for stage in self._measurements() if gpus else ():
            assert gpus is not None and isinstance(stage.params, EfficiencyParameters)
            params, dims = stage.params, self._dims(stage)
            job = Generate(max(params.batch_sizes), params.most_tokens, ITEMSIZE[params.dtype])
            if not fits(job, dims, gpus):
                raise UserError(
                    f"efficiency {stage.label}: about {job.memory(dims, 1).total / GIB:,.0f} GiB on the GPU of rank 0, "
                    f"which has {gpus.memory / GIB:,.0f} GiB and gets the model and its dense one whole, whatever "
                    "runtime.sharding says; fewer efficiency.batch_sizes or tokens, or efficiency.enabled false"
                )

    def _measurements(self) -> list[Stage]:
        return [stage for stage in self._stages if isinstance(stage.params, EfficiencyParameters)]

    def _tasks(self) -> list[str]:
        from hfprune_dist.evaluation.task_definitions import generating_tasks  # searches thousands of files

        include_path = self._config.evaluation.include_path
        return generating_tasks(self._config.evaluation.tasks, Path(include_path) if include_path else None)

    def _gathered(self) -> Mapping[str, tuple[int, int]]:
        """Dense models of evaluations that are sharded -> bytes gathered for each token, and ranks."""
        if not self._config.evaluation.tasks:
            return {}
        gpus, found = self._gpus_of_evaluations(), {}
        for stage in self._stages:
            if isinstance(stage.params, EvaluateParameters):
                runtime, itemsize = self._config.runtime, ITEMSIZE[stage.params.dtype]
                size = gathered_per_token(self._dims(stage), itemsize, gpus, runtime)
                if size:
                    found[self._plan.dense_folder(stage).name] = size, gpus.ranks
        return found

    def _gpus_of_evaluations(self) -> Gpus:
        """With unknown memory, that of ranks without GPUs."""
        if self._profile is not None:
            resources = self._profile.resources["evaluate"]
            return Gpus(resources.nodes, resources.tasks_per_node, (resources.gpu_memory_gib or 0.0) * GIB)
        runtime: RuntimeConfig = self._config.runtime
        return gpus_here(runtime) or Gpus(nodes=1, per_node=ranks_here(runtime), memory=0.0)

    def _dims(self, stage: Stage) -> Dimensions:
        """Of the dense model that a stage's comes from, which is as large or larger."""
        return checkpoint_dimensions(self._plan.dense_checkpoint(stage))

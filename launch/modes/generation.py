"""The cost of generating with large models: announced before the first stage, and refused if it can't work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from hfprune_launch.local.hardware import gpus_here, ranks_here
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.stage_jobs import gpus_of

from hfprune_dist.config.parameters import EfficiencyParameters, EvaluateParameters
from hfprune_dist.config.schema import RuntimeConfig, SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.planning.dimensions import Dimensions, checkpoint_dimensions
from hfprune_dist.planning.memory import GIB, Evaluate, Generate, Gpus, fits
from hfprune_dist.planning.placement import place
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage


class Generation:
    """The stages in which models generate, among those that must run.

    Args:
        config: configuration with the runtime that fits where stages run.
        todo: ids of the stages that must run.
        profile: profile of the cluster on which they run; None for this machine.
    """

    def __init__(self, config: SweepConfig, plan: Plan, todo: Sequence[str], profile: Profile | None) -> None:
        self._config = config
        self._plan = plan
        self._stages = [plan.stages[stage_id] for stage_id in todo]
        self._profile = profile

    def remarks(self) -> Iterator[str]:
        """Yield sentences on the cost of generating with sharded models, and on stages that never shard theirs."""
        gathered = self._gathered()
        if gathered and (tasks := self._tasks()):
            for model, (size, ranks) in gathered.items():
                yield (
                    f"{', '.join(tasks)}: the model generates, and {model} is sharded over {ranks} ranks (ZeRO-3), so "
                    f"that each of them gathers all {size / 1e9:,.3g} GB of it for every token; where it fits on each "
                    "GPU runtime.sharding replicate is much faster, else leave such tasks out"
                )
        if self._config.runtime.sharding == "zero3" and self._measurements():
            yield "efficiency is measured with whole models on rank 0, whatever runtime.sharding says"

    def require_room(self) -> None:
        """Check that rank 0 has room for both models whose efficiency it measures, if stages run on this machine.

        A profile's GPUs are checked elsewhere, with everything that its stages need.

        Raises:
            UserError: if it has no room; names the stage, what it needs and what helps.
        """
        measurements = self._measurements()
        if self._profile is not None or not measurements or (gpus := gpus_here(self._config.runtime)) is None:
            return
        for stage in measurements:
            assert isinstance(stage.params, EfficiencyParameters)
            job, dims = Generate.of(stage.params, self._plan.dense_checkpoint(stage)), self._dims(stage)
            if not fits(job, dims, gpus):
                raise UserError(
                    f"efficiency {stage.label}: about {job.memory(dims, 1).needed / GIB:,.0f} GiB on the GPU of rank "
                    f"0, which has {gpus.memory / GIB:,.0f} GiB and gets the model and its dense one whole, whatever "
                    "runtime.sharding says; fewer efficiency.batch_sizes or tokens, or efficiency.enabled false"
                )

    def _measurements(self) -> list[Stage]:
        return [stage for stage in self._stages if isinstance(stage.params, EfficiencyParameters)]

    def _tasks(self) -> list[str]:
        from hfprune_dist.evaluation.task_index import generating_tasks

        include_path = self._config.evaluation.include_path
        return generating_tasks(self._config.evaluation.tasks, Path(include_path) if include_path else None)

    def _gathered(self) -> Mapping[str, tuple[int, int]]:
        """Name of each sharded evaluation's dense model -> bytes gathered for each token, and number of ranks."""
        if not self._config.evaluation.tasks:
            return {}
        gpus, sharding, found = self._gpus_of_evaluations(), self._config.runtime.sharding, {}
        names = {cell.evaluate: cell.model for cell in self._plan.cells}
        for stage in self._stages:
            if isinstance(stage.params, EvaluateParameters):
                dims, job = self._dims(stage), Evaluate.of(stage.params, window=0, positions=None)
                known = gpus if gpus.memory else replace(gpus, memory=inf)
                if gpus.ranks > 1 and not place(job, dims, known, sharding).whole:
                    found[names[stage.id]] = dims.parameters * job.itemsize, gpus.ranks
        return found

    def _gpus_of_evaluations(self) -> Gpus:
        """Return the GPUs of evaluations; 0 stands for unknown memory, and for ranks without GPUs."""
        if self._profile is not None:
            return gpus_of(self._profile.resources["evaluate"])
        runtime: RuntimeConfig = self._config.runtime
        return gpus_here(runtime) or Gpus(nodes=1, per_node=ranks_here(runtime), memory=0.0)

    def _dims(self, stage: Stage) -> Dimensions:
        """Return the dimensions of the dense model that a stage's model comes from, which is as large or larger."""
        return checkpoint_dimensions(self._plan.dense_checkpoint(stage))

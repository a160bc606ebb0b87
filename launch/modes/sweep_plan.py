"""From a configuration to a plan that can be run: what is missing, where it would run, and whether it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from hfprune_launch.local.hardware import fitting_runtime
from hfprune_launch.modes.sweep_arguments import PROJECT, Command
from hfprune_launch.preflight import check_stages
from hfprune_launch.slurm.batch_script import refuse_unusable_path
from hfprune_launch.slurm.estimate import Estimate, estimate_stages, refuse_what_cannot_fit
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.sweep_folder import Sweep, read_record, require_apart, require_folder

from hfprune_dist.config.schema import RuntimeConfig, SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.earlier_rows import with_earlier_rows
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import ModelSource, resolve_models
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store, Verdict


@dataclass(frozen=True)
class Prepared:
    """A sweep before its first stage; nothing has been written.

    Attributes:
        config: as configured.
        here: the configuration with the runtime that fits where stages run.
        verdicts: by stage id.
        todo: ids of the stages that must run, in order.
        profile: of the cluster where they run; None: this machine.
        estimates: of what they need of its GPUs.
    """

    sweep: Sweep
    config: SweepConfig
    here: SweepConfig
    models: Sequence[ModelSource]
    verdicts: Mapping[str, Verdict]
    todo: Sequence[str]
    profile: Profile | None
    estimates: Sequence[Estimate]

    def require_runnable(self) -> None:
        """Raises UserError for what a stage would refuse, after the hours that others take before it."""
        refuse_what_cannot_fit(self.estimates)
        check_stages(self.here, self.sweep.plan, self.todo, self.profile)


def prepare(command: Command, *, download: bool) -> Prepared:
    """Plan a sweep and see what is there of it.

    Args:
        download: fetch models of the hub that are not in the local cache.

    Raises:
        UserError: for bad input; nothing has been written.
    """
    config = command.configuration()
    require_folder(command.out)
    store = command.store
    models, plan = _plan(config, store, download=download)
    require_apart(command.out, plan)
    for model in models:
        for remark in model.checkpoint.remarks:
            command.tell(f"note: model {model.name!r}: {remark}")
    profile = command.profile()
    if profile is not None:
        refuse_unusable_path(command.out)
    verdicts = {stage_id: store.handle(stage_id).verify() for stage_id in plan.stages}
    todo = plan.lacking(lambda stage_id: verdicts[stage_id].state == "done")
    here = config.model_copy(update={"runtime": _runtime(command, config, profile)})
    estimates = estimate_stages(plan, todo, profile, config.runtime) if profile is not None else []
    return Prepared(Sweep(plan, store, command.out), config, here, models, verdicts, todo, profile, estimates)


def _runtime(command: Command, config: SweepConfig, profile: Profile | None) -> RuntimeConfig:
    """The runtime as configured; on this machine with no more ranks than GPUs, where a file asks for more."""
    if profile is not None or command.asks_for_ranks():
        return config.runtime
    runtime, remark = fitting_runtime(config.runtime)
    command.tell(remark)
    return runtime


def sweep_to_show(command: Command) -> Sweep:
    """Today's plan with the folder's other rows; where its inputs can't be read any more, what the folder tells."""
    config, store, out = command.configuration(), command.store, command.out
    show = partial(Sweep, store=store, out=out)
    try:
        today = _plan(config, store, download=False)[1]
    except UserError:
        record = read_record(out)
        if record is None:
            raise
        return show(record.plan)
    record = read_record(out)
    return show(with_earlier_rows(today, record.plan) if record else today)


def _plan(config: SweepConfig, store: Store, download: bool) -> tuple[list[ModelSource], Plan]:
    models = resolve_models(config, PROJECT / "configs" / "models", store.hashes, download)
    methods = resolve_methods(config, PROJECT / "configs" / "methods")
    return models, build_plan(config, models, methods, store.hashes)

"""Preparation of a runnable plan from a configuration: what is missing, where it would run, and whether it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfprune_launch.command import as_called
from hfprune_launch.local.hardware import device_here, fitting_runtime
from hfprune_launch.modes.sweep_arguments import Command
from hfprune_launch.preflight import check_stages
from hfprune_launch.project import PROJECT
from hfprune_launch.slurm.estimate import Estimate, estimate_stages, refuse_what_cannot_fit
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.script import default_threads, refuse_unusable_path
from hfprune_launch.sweep_folder import Sweep, recorded_sweep, require_apart, require_folder

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import ModelSource, resolve_models
from hfprune_dist.planning.plan import refuse_other_checkpoints
from hfprune_dist.planning.ratios import place_of
from hfprune_dist.planning.remarks import planned_sizes, remarks_on_method, remarks_on_texts, sizes_of
from hfprune_dist.store.artifacts import Verdict
from hfprune_dist.store.claims import Cancellation

NO_MODELS = """no models are named: give --models, or models in a --config file; for example
  python launch/sweep.py --models llama,qwen --ratios 0.2,0.5 --config configs/demo.yaml
  python launch/sweep.py --models /data/my-llama --ratios 0.2 --set calibration.path=text.jsonl
  python launch/sweep.py --models Qwen/Qwen2.5-0.5B --dry-run
all flags: python launch/sweep.py --help"""


@dataclass(frozen=True)
class Prepared:
    """A sweep before its first stage; nothing has been written.

    Attributes:
        config: the configuration as given.
        here: the configuration with the runtime that fits where stages run.
        verdicts: verdicts on artifacts, by stage id.
        todo: ids of the stages that must run, in order.
        profile: profile of the cluster on which they run; None for this machine.
        estimates: estimates of what they need of its GPUs.
        methods: methods, by name.
        cancellation: tells whether the sweep has been cancelled since its planning began.
    """

    sweep: Sweep
    config: SweepConfig
    here: SweepConfig
    models: Sequence[ModelSource]
    verdicts: Mapping[str, Verdict]
    todo: Sequence[str]
    profile: Profile | None
    estimates: Sequence[Estimate]
    methods: Mapping[str, Method]
    cancellation: Cancellation

    def remarks(self) -> list[str]:
        """Return sentences on the effect of settings: how texts are mixed, and what each method does to each model."""
        shares = [f"{it.windows} of {it.text.path or it.text.dataset}" for it in self.config.calibration.shares()]
        mixed = [f"calibration windows: {', '.join(shares)}"] if len(shares) > 1 else []
        return mixed + [
            remark
            for model in self.models
            for name, method in self.methods.items()
            for remark in remarks_on_method(model.checkpoint, method, place_of(model.name, name))
        ]

    def shapes(self) -> dict[str, dict[str, str]]:
        """Label of a cell -> sizes of its checkpoint as far as the plan decides them, in the order of the table."""
        models = {model.name: model for model in self.models}
        shapes = {}
        for cell in self.sweep.plan.cells:
            model = models[cell.model]
            if cell.ratio is None or cell.method is None:
                shapes[cell.label] = sizes_of(model.checkpoint)
            else:
                method, where = self.methods[cell.method], place_of(cell.model, cell.method)
                shapes[cell.label] = planned_sizes(model.checkpoint, cell.ratio, method, where)
        return shapes

    def require_runnable(self, command: Command) -> None:
        """Raise UserError for input that a stage would otherwise refuse only after hours of other stages' work.

        Notes on input that is accepted are told.
        """
        refuse_what_cannot_fit(self.estimates)
        absent = [model.checkpoint.path for model in self.models if not model.is_here]
        plan, looks_only = self.sweep.plan, command.arguments.dry_run
        for remark in check_stages(self.here, plan, self.todo, self.profile, absent=absent, looks_only=looks_only):
            command.tell(f"note: {remark}")


def prepare(command: Command, *, download: bool) -> Prepared:
    """Plan a sweep, and check which of its artifacts exist.

    Args:
        download: fetch models from the hub that are not in the local cache; otherwise they have stand-ins.

    Raises:
        UserError: for bad input; nothing has been written.
    """
    require_folder(command.out)
    store, profile = command.store, command.profile()
    cancellation = Cancellation(store.root)
    config = command.configuration()
    if not config.models:
        raise UserError(as_called(NO_MODELS))
    models = resolve_models(config, PROJECT.configs / "models", store.hashes, download)
    methods = resolve_methods(config, PROJECT.configs / "methods")
    here = config.runtime
    if profile is None:
        here, remark = fitting_runtime(config.runtime)
        command.tell(remark)
    device = device_here(config.runtime)
    if profile is not None:
        resources = profile.resources["efficiency"]
        device = resources.device(default_threads(resources, config.runtime.threads_per_rank))
        refuse_unusable_path(command.out)
    plan = build_plan(config, models, methods, store.hashes, device)
    require_apart(command.out, plan)
    if record := recorded_sweep(command.out):
        refuse_other_checkpoints(plan, record.plan, command.out)
    remarks = [*remarks_on_texts(config, methods), *(remark for model in models for remark in _remarks_on(model))]
    for remark in remarks:
        command.tell(f"note: {remark}")
    verdicts = {stage_id: store.handle(stage_id).verify() for stage_id in plan.stages}
    todo = plan.lacking(lambda stage_id: verdicts[stage_id].state == "done")
    estimates = estimate_stages(plan, todo, profile, config.runtime) if profile is not None else []
    runs = config.model_copy(update={"runtime": here})
    sweep = Sweep(plan, store, command.out)
    return Prepared(sweep, config, runs, models, verdicts, todo, profile, estimates, methods, cancellation)


def _remarks_on(model: ModelSource) -> list[str]:
    if model.is_here:
        return []
    told = "it is downloaded when the sweep runs; only its config.json and its tensors' shapes were looked up"
    return [f"model {model.name!r}: {told}"]

"""Preparation of a runnable plan from a configuration: what is missing, where it would run, and whether it can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from hfprune_launch.command import as_called
from hfprune_launch.local.hardware import device_here, fitting_runtime, gpus_here
from hfprune_launch.modes.sweep_arguments import Command
from hfprune_launch.preflight import check_stages
from hfprune_launch.project import PROJECT
from hfprune_launch.slurm.estimate import Estimate, estimate_stages, gpus_of_profile, refuse_what_cannot_fit
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.script import default_threads, refuse_unusable_path
from hfprune_launch.sweep_folder import Record, Sweep, read_record, require_apart, require_folder

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import RuntimeConfig, SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.efficiency import EfficiencyParameters
from hfprune_dist.kinds.placement import choose_micro_batches, chooses
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import ModelSource, resolve_models
from hfprune_dist.planning.plan import Plan, refuse_other_checkpoints, with_earlier_rows
from hfprune_dist.planning.ratios import place_of
from hfprune_dist.planning.remarks import planned_sizes, remarks_on_settings, remarks_on_shapes, sizes_of
from hfprune_dist.store.artifacts import Verdict
from hfprune_dist.store.cancellation import Cancellation

NO_MODELS = """no models are named: give --models, or models in a --config file; for example
  python launch/sweep.py --models llama,qwen --ratios 0.2,0.5 --config configs/demo.yaml
  python launch/sweep.py --models /data/my-llama --ratios 0.2 --set calibration.path=text.jsonl
  python launch/sweep.py --models Qwen/Qwen2.5-0.5B --dry-run
all flags: python launch/sweep.py --help"""
# Section of the configuration -> the kind of stage that it configures.
TRAINING_STAGES = {"recovery": "recover", "distillation": "distill"}


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
            if model.has_known_shape
            for name, method in self.methods.items()
            for remark in remarks_on_shapes(model.checkpoint, self.config.ratios, method, place_of(model.name, name))
        ]

    def shapes(self) -> dict[str, dict[str, str]]:
        """Label of a cell -> sizes of its checkpoint as far as the plan decides them, in the order of the table."""
        models = {model.name: model for model in self.models}
        shapes = {}
        for cell in self.sweep.plan.cells:
            model = models[cell.model]
            if not model.has_known_shape:
                shapes[cell.label] = {"note": "unknown until the model is downloaded"}
            elif cell.ratio is None or cell.method is None:
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
    store = command.store
    cancellation = Cancellation(store.root)
    profile = command.profile()
    device = _device_in(profile)
    config, models, methods, plan = _plan(command, device, command.tell, download=download, stands_in=not download)
    require_apart(command.out, plan)
    if (record := _readable_record(command)) and all(model.has_known_shape for model in models):
        refuse_other_checkpoints(plan, record.plan, command.out)
    for remark in remarks_on_settings(config, methods):
        command.tell(f"note: {remark}")
    for model in models:
        for remark in _remarks_on(model):
            command.tell(f"note: model {model.name!r}: {remark}")
    if profile is not None:
        refuse_unusable_path(command.out)
    verdicts = {stage_id: store.handle(stage_id).verify() for stage_id in plan.stages}
    todo = plan.lacking(lambda stage_id: verdicts[stage_id].state == "done")
    here = config.model_copy(update={"runtime": _runtime(command, config, profile)})
    sized = _of_known_shape(plan, todo, models)
    estimates = estimate_stages(plan, sized, profile, config.runtime) if profile is not None else []
    sweep = Sweep(plan, store, command.out)
    return Prepared(sweep, config, here, models, verdicts, todo, profile, estimates, methods, cancellation)


def _of_known_shape(plan: Plan, todo: Sequence[str], models: Sequence[ModelSource]) -> list[str]:
    unknown = {model.checkpoint.path for model in models if not model.has_known_shape}
    return [stage_id for stage_id in todo if plan.dense_folder(plan.stages[stage_id]) not in unknown]


def _remarks_on(model: ModelSource) -> list[str]:
    if model.is_here:
        return []
    if model.has_known_shape:
        return ["it is downloaded when the sweep runs; only its config.json and its tensors' shapes were looked up"]
    return ["it isn't in the local hub cache, and the hub can't be asked for its shape; ids of its stages will change"]


def _runtime(command: Command, config: SweepConfig, profile: Profile | None) -> RuntimeConfig:
    """Return the runtime as configured; on this machine with no more ranks than GPUs, if a file asks for more."""
    if profile is not None or command.asks_for_ranks():
        return config.runtime
    runtime, remark = fitting_runtime(config.runtime)
    command.tell(remark)
    return runtime


def sweep_to_show(command: Command) -> Sweep:
    """Return today's plan with the folder's other rows, or the recorded plan if inputs can't be read: they may be
    gone, or another user's.
    """
    store, out, settings = command.store, command.out, command.overrides()
    show, record = partial(Sweep, store=store, out=out), read_record(out)
    try:
        device = _device_of(record)
        tells = device_here if device is None else lambda _: device
        *_, today = _plan(command, tells, lambda _: None, download=False, stands_in=False)
    except (UserError, OSError) as error:
        if record is None:
            raise
        if settings:
            command.tell(f"note: this command's settings are left out, and the sweep is as last planned: {error}")
        return show(record.plan)
    return show(with_earlier_rows(today, record.plan) if record else today)


def _device_in(profile: Profile | None) -> Callable[[RuntimeConfig], str]:
    """Return what tells, for a runtime, on which device of a profile, or of this machine, efficiency is measured."""
    if profile is None:
        return device_here
    resources = profile.resources["efficiency"]
    return lambda runtime: resources.device(default_threads(resources, runtime.threads_per_rank))


def _device_of(record: Record | None) -> str | None:
    """Return the device on which a folder's last run measured efficiency; None if it didn't."""
    stages = record.plan.stages.values() if record else ()
    devices = (it.params.device for it in stages if isinstance(it.params, EfficiencyParameters))
    return next(devices, None)


def _plan(
    command: Command,
    device: Callable[[RuntimeConfig], str],
    tell: Callable[[str], None],
    *,
    download: bool,
    stands_in: bool,
) -> tuple[SweepConfig, list[ModelSource], dict[str, Method], Plan]:
    """Return the configuration with all that planning chooses, and its models, methods and plan.

    Args:
        device: tells on which device efficiency is measured.
        tell: told which micro-batches are chosen for a run.
    """
    config, hashes = command.configuration(), command.store.hashes
    if not config.models:
        raise UserError(as_called(NO_MODELS))
    models = resolve_models(config, PROJECT.configs / "models", hashes, download, stands_in)
    methods = resolve_methods(config, PROJECT.configs / "methods")
    if chooses(config):
        config, remark = _with_micro_batches(command.profile(), config, models, methods)
        tell(remark)
    try:
        plan = build_plan(config, models, methods, hashes, device(config.runtime))
    except UserError as error:
        if unknown := [model.name for model in models if not model.has_known_shape]:
            raise UserError(f"{error}\na Llama stands in for {', '.join(unknown)}, unknown until downloaded") from None
        raise
    return config, models, methods, plan


def _readable_record(command: Command) -> Record | None:
    """Return the folder's record; None if there is none, or if it is damaged, whose rows are lost."""
    with suppress(UserError):
        return read_record(command.out)
    return None


def _with_micro_batches(
    profile: Profile | None, config: SweepConfig, models: Sequence[ModelSource], methods: Mapping[str, Method]
) -> tuple[SweepConfig, str]:
    """Return the configuration with micro-batches that suit the GPUs of the profile, or of this machine, and a remark
    on them; it is empty where there are no GPUs.
    """
    if profile is None:
        found = dict.fromkeys(TRAINING_STAGES, gpus_here(fitting_runtime(config.runtime)[0]))
    else:
        found = {name: gpus_of_profile(profile.resources[kind]) for name, kind in TRAINING_STAGES.items()}
    gpus = {name: it for name, it in found.items() if it is not None}
    known = [it.checkpoint for it in models if it.has_known_shape]
    if not known:
        return config, ""
    chosen = choose_micro_batches(config, known, gpus, methods.values())
    sizes = {name: getattr(chosen, name).rows_at_once for name in TRAINING_STAGES}
    remark = f"note: micro-batches of {' and '.join(f'{name} {size}' for name, size in sizes.items())}"
    if gpus:
        return chosen, remark
    if profile is not None and any(profile.resources[kind].gpus for kind in TRAINING_STAGES.values()):
        return chosen, f"{remark}, as the profile doesn't say gpu_memory_gib; config.yaml keeps them"
    return chosen, ""

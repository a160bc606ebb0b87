"""From a request to a runnable plan: what is missing, where it would run, and whether it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune_launch.command import as_called
from hfprune_launch.local.hardware import device_here, fitting_runtime
from hfprune_launch.preflight import check_stages
from hfprune_launch.project import PROJECT
from hfprune_launch.screen import say
from hfprune_launch.slurm.estimate import Estimate, estimate_stages, refuse_what_cannot_fit
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.script import default_threads, refuse_unusable_path
from hfprune_launch.sweep_folder import Sweep, configuration, recorded_sweep, require_apart, require_folder
from rich.console import Console

from hfprune_dist.config.method import Method
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.errors import UserError
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import ModelSource, resolve_models
from hfprune_dist.planning.plan import refuse_other_checkpoints
from hfprune_dist.planning.ratios import place_of
from hfprune_dist.planning.remarks import planned_sizes, remarks_on_method, remarks_on_texts, sizes_of
from hfprune_dist.store.artifacts import Store, Verdict
from hfprune_dist.store.claims import Cancellation

NO_MODELS = """no models are named: give --models, or models in a --config file; for example
  python launch/sweep.py --models llama,qwen --ratios 0.2,0.5 --config configs/demo.yaml
  python launch/sweep.py --models /data/my-llama --ratios 0.2 --set calibration.path=text.jsonl
  python launch/sweep.py --models Qwen/Qwen2.5-0.5B --dry-run
all flags: python launch/sweep.py --help"""


@dataclass(frozen=True)
class Request:
    """What a command line or a session in Python asks for.

    Attributes:
        out: folder of the sweep.
        files: YAML files of settings; without any, those of the folder's last run.
        overrides: dotted key -> value of settings that win over files.
        profile: profile of the cluster on which stages run; None for this machine.
        follow: whether to stay until all jobs have ended.
    """

    out: Path
    console: Console
    files: Sequence[Path] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile | None = None
    follow: bool = True

    def tell(self, text: str) -> None:
        """Print a line as it is; nothing if it is empty."""
        if text:
            say(self.console, text)


@dataclass(frozen=True)
class Prepared:
    """A sweep before its first stage; nothing has been written.

    Attributes:
        config: the configuration as given.
        here: the configuration with the runtime that fits where stages run.
        methods: methods, by name.
        verdicts: verdicts on artifacts, by stage id.
        todo: ids of the stages that must run, in order.
        estimates: estimates of what they need of a cluster's GPUs.
        cancellation: tells whether the sweep has been cancelled since its planning began.
    """

    request: Request
    sweep: Sweep
    config: SweepConfig
    here: SweepConfig
    models: Sequence[ModelSource]
    methods: Mapping[str, Method]
    verdicts: Mapping[str, Verdict]
    todo: Sequence[str]
    estimates: Sequence[Estimate]
    cancellation: Cancellation

    def remarks(self) -> list[str]:
        """Return sentences on the effect of settings: how texts are mixed, and what each method does to each model."""
        texts = self.config.calibration.shares()
        shares = [f"{share.windows} of {share.text.path or share.text.dataset}" for share in texts]
        mixed = [f"calibration windows: {', '.join(shares)}"] if len(shares) > 1 else []
        return mixed + [
            remark
            for model in self.models
            if model.has_known_shape
            for name, method in self.methods.items()
            for remark in remarks_on_method(model.checkpoint, method, place_of(model.name, name))
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

    def require_runnable(self, looks_only: bool = False) -> None:
        """Raise UserError for input that a stage would otherwise refuse only after hours of other stages' work.

        Args:
            looks_only: whether it is for a dry run, which asks for no data sets.
        """
        refuse_what_cannot_fit(self.estimates)
        absent = [model.checkpoint.path for model in self.models if not model.is_here]
        plan, profile = self.sweep.plan, self.request.profile
        check_stages(self.here, plan, self.todo, profile, absent=absent, looks_only=looks_only)


def prepare(request: Request, *, download: bool) -> Prepared:
    """Plan a sweep, and check which of its artifacts exist.

    Args:
        download: fetch models from the hub that are not in the local cache; otherwise only their shapes are looked up.

    Raises:
        UserError: for bad input; nothing has been written.
    """
    out, profile = request.out, request.profile
    require_folder(out)
    store = Store(out / "store")
    cancellation = Cancellation(store.root)
    config, remark = configuration(out, request.files, request.overrides)
    request.tell(remark)
    if not config.models:
        raise UserError(as_called(NO_MODELS))
    models = resolve_models(config, PROJECT.configs / "models", store.hashes, download)
    methods = resolve_methods(config, PROJECT.configs / "methods")
    if profile is None:
        runtime, remark = fitting_runtime(config.runtime)
        request.tell(remark)
        device = device_here(config.runtime)
    else:
        runtime, resources = config.runtime, profile.resources["efficiency"]
        device = resources.device(default_threads(resources, runtime.threads_per_rank))
        refuse_unusable_path(out)
    unknown = {model.checkpoint.path: model.name for model in models if not model.has_known_shape}
    try:
        plan = build_plan(config, models, methods, store.hashes, device)
    except UserError as error:
        if not unknown:
            raise
        names = ", ".join(unknown.values())
        raise UserError(f"{error}\na Llama stands in for {names}, unknown until downloaded") from None
    require_apart(out, plan)
    if (record := recorded_sweep(out)) and not unknown:
        refuse_other_checkpoints(plan, record.plan, out)
    for remark in remarks_on_texts(config, methods):
        request.tell(f"note: {remark}")
    for model in models:
        if not model.is_here:
            told = "it is downloaded when the sweep runs; only its config.json and its tensors' shapes were looked up"
            if not model.has_known_shape:
                told = "neither here nor can the hub be asked for its shape; ids of its stages will change"
            request.tell(f"note: model {model.name!r}: {told}")
    verdicts = {stage_id: store.handle(stage_id).verify() for stage_id in plan.stages}
    todo = plan.lacking(lambda stage_id: verdicts[stage_id].state == "done")
    sized = [stage_id for stage_id in todo if plan.dense_folder(plan.stages[stage_id]) not in unknown]
    return Prepared(
        request=request,
        sweep=Sweep(plan, store, out),
        config=config,
        here=config.model_copy(update={"runtime": runtime}),
        models=models,
        methods=methods,
        verdicts=verdicts,
        todo=todo,
        estimates=estimate_stages(plan, sized, profile, runtime) if profile is not None else [],
        cancellation=cancellation,
    )

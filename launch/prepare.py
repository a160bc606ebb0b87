"""From a request to a runnable plan: what is missing, where it would run, and whether it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfprune_launch.local.hardware import device_here, ranks_here
from hfprune_launch.project import PROJECT
from hfprune_launch.screen import say
from hfprune_launch.slurm.estimate import Estimate, estimate_stages
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
from hfprune_dist.planning.remarks import remarks_on_texts
from hfprune_dist.results.formats import counted
from hfprune_dist.store.artifacts import Store, Verdict
from hfprune_dist.store.claims import Cancellation
from hfprune_dist.store.machine import count_gpus, usable_cores

NO_MODELS = (
    "no models are named: give --models, or models in a --config file; for example --models Qwen/Qwen2.5-0.5B --ratios "
    "0.2 --dry-run; --help explains all flags"
)


@dataclass(frozen=True)
class Request:
    """What a command line or a session in Python asks for."""

    out: Path  # the sweep's folder
    console: Console
    files: Sequence[Path] = ()  # YAML; without any, the settings are those of the folder's last run
    overrides: Mapping[str, Any] = field(default_factory=dict)  # dotted key -> value; these win over files
    profile: Profile | None = None  # of the cluster on which stages run; None for this machine
    follow: bool = True  # whether to stay until all jobs have ended

    def tell(self, text: str) -> None:
        """Print a line as it is."""
        say(self.console, text)


@dataclass(frozen=True)
class Prepared:
    """A sweep before its first stage; nothing has been written."""

    request: Request
    sweep: Sweep
    config: SweepConfig
    models: Sequence[ModelSource]
    methods: Mapping[str, Method]  # by name
    verdicts: Mapping[str, Verdict]  # on artifacts, by stage id
    todo: Sequence[str]  # ids of the stages that must run, in order
    estimates: Sequence[Estimate]  # of what they need of a cluster's GPUs
    cancellation: Cancellation  # of the sweep since its planning began


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
    if remark:
        request.tell(remark)
    runtime = config.runtime
    if not config.models:
        raise UserError(NO_MODELS)
    models = resolve_models(config, PROJECT.configs / "models", store.hashes, download)
    methods = resolve_methods(config, PROJECT.configs / "methods")
    if profile is None:
        device, ranks = device_here(runtime), ranks_here(runtime)
        if ranks < (runtime.ranks or 1):
            request.tell(
                f"note: runtime.ranks {runtime.ranks} is more than this machine's GPUs; stages run with {ranks}"
            )
        elif not count_gpus() and ranks > usable_cores():
            request.tell(f"note: {ranks} ranks share {counted(usable_cores(), 'core')}; as many as cores are as fast")
    else:
        resources = profile.resources["efficiency"]
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
            unasked = "neither here nor can the hub be asked for its shape; ids of its stages will change"
            told = "it is downloaded when the sweep runs; only its config.json and its tensors' shapes were looked up"
            request.tell(f"note: model {model.name!r}: {told if model.has_known_shape else unasked}")
    verdicts = {stage_id: store.handle(stage_id).verify() for stage_id in plan.stages}
    todo = plan.lacking(lambda stage_id: verdicts[stage_id].state == "done")
    sized = [stage_id for stage_id in todo if plan.dense_folder(plan.stages[stage_id]) not in unknown]
    return Prepared(
        request=request,
        sweep=Sweep(plan, store, out),
        config=config,
        models=models,
        methods=methods,
        verdicts=verdicts,
        todo=todo,
        estimates=estimate_stages(plan, sized, profile, runtime) if profile is not None else [],
        cancellation=cancellation,
    )

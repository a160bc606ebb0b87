"""From a request to a runnable plan: what is missing, where it would run, and whether it can. What a stage would
otherwise refuse only after hours of other stages' work is refused here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hfprune_launch.local.backend import device_here, ranks_here
from hfprune_launch.project import PROJECT
from hfprune_launch.screen import say
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.estimate import Estimate, estimate_stages, refuse_what_cannot_fit
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.script import default_threads, refuse_unusable_path
from hfprune_launch.sweep_folder import Sweep, configuration, recorded_sweep, require_apart, require_folder
from rich.console import Console

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import TextSource
from hfprune_dist.data.examples import read_examples
from hfprune_dist.data.text import Beginning, read_beginning, read_texts, require_data_set
from hfprune_dist.engines.process import require_engine
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.memory import settings_of
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import ModelSource, resolve_models
from hfprune_dist.planning.plan import refuse_other_checkpoints
from hfprune_dist.planning.remarks import remarks_on_texts
from hfprune_dist.store.artifacts import Store, Verdict
from hfprune_dist.store.claims import Cancellation
from hfprune_dist.store.machine import count_gpus
from hfprune_dist.store.provenance import package_versions

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
    """Plan a sweep, and check which of its artifacts exist. Of models that are not in the hub's local cache, only
    shapes are looked up, unless ``download`` fetches them. Raises UserError for bad input; nothing has been written
    then.
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
    methods = resolve_methods(config, PROJECT.configs / "methods")
    models = resolve_models(config, PROJECT.configs / "models", store.hashes, download)
    if profile is None:
        device, ranks = device_here(runtime), ranks_here(runtime)
        if ranks < (runtime.ranks or 1):
            request.tell(
                f"note: runtime.ranks {runtime.ranks} is more than this machine's GPUs; stages run with {ranks}"
            )
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
            unasked = "not here, and the hub can't be asked for its shape; ids of its stages will change"
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


# Whether it can run.


class Text(NamedTuple):
    """A text that stages will read."""

    section: str  # of the configuration, which describes it
    where: str  # its name in the stages' messages
    beginning: Beginning[Any] | None  # its first texts; None if they come from the hub
    sequence_length: int  # tokens per window, or per row to train on
    windows: int  # number of windows that are cut from it; 0 if it is to train on
    add_bos_token: bool
    answer_tokens: int = 0  # that an answer of the dense model to an instruction takes


def require_runnable(prepared: Prepared, *, looks_only: bool = False) -> None:
    """Refuse what a stage would otherwise refuse only after hours of other stages' work: check that the missing stages
    can run, and what they will read for every model. A dry run, which ``looks_only``, needs no Slurm and asks for no
    data sets.
    """
    config, plan, profile = prepared.config, prepared.sweep.plan, prepared.request.profile
    stages, evaluation = [plan.stages[stage_id] for stage_id in prepared.todo], config.evaluation
    kinds = {stage.kind for stage in stages}
    refuse_what_cannot_fit(prepared.estimates)
    if stages and profile is not None and not looks_only:
        SlurmCommands().require()
        torch = str(package_versions(["torch"])["torch"])
        if torch.endswith("+cpu") and any(profile.resources[kind].gpus for kind in kinds):
            raise UserError(
                f"torch {torch} was installed without CUDA, as where there is no GPU, and the profile asks for GPUs; "
                "remove .venv, set UV_TORCH_BACKEND=cu130 (drivers before 580: cu126), and run launch/quickstart.sh"
            )
    if stages and profile is None and count_gpus():
        from hfprune_dist.distributed.world import require_usable_gpus  # torch takes seconds to import

        require_usable_gpus()
    for tracker in config.runtime.report_to if any(KINDS[kind].trains for kind in kinds) else ():
        if find_spec(tracker) is None:
            raise UserError(
                f"runtime.report_to: {tracker} is not installed; `pip install {tracker}`, or leave it out of the list"
            )
    engines = [*config.engines] if "check" in kinds else []
    engines += [config.efficiency.engine] if config.efficiency.engine and "efficiency" in kinds else []
    engines += ["vllm"] if "answers" in kinds and "vllm" in config.runtime.engine_pythons else []
    for engine in engines if not looks_only else ():  # whose Python a configuration names
        require_engine(engine, config.runtime.python_of(engine))
    texts = list(_texts(config, kinds, looks_only))
    has_tasks = bool(evaluation.tasks) and "evaluate" in kinds
    if has_tasks:
        from hfprune_dist.evaluation.lm_eval_tasks import check_tasks  # lm-eval takes seconds to import

        include_path = Path(evaluation.include_path) if evaluation.include_path else None
        check_tasks(evaluation.tasks, include_path, data=not looks_only)
    # Tokenizers of dense models are those of the models pruned from them, too. A dry run may lack a model of the hub.
    absent = {model.checkpoint.path for model in prepared.models if not model.is_here}
    folders = dict.fromkeys(plan.dense_folder(stage) for stage in stages if settings_of(stage).tokenizes)
    for folder in (folder for folder in folders if folder not in absent):
        _check_model(folder, texts, has_tasks and evaluation.apply_chat_template)


def _texts(config: SweepConfig, kinds: Collection[str], looks_only: bool) -> Iterator[Text]:
    """The texts that stages of these kinds will read, among those that are checked here."""
    calibration, evaluation = config.calibration, config.evaluation

    def text(section: str, source: TextSource, length: int, windows: int = 0, add_bos_token: bool = False) -> Text:
        name = section.rpartition(".")[2]
        beginning: Beginning[Any] | None = None
        path = None if source.path is None else Path(source.path)
        if path is not None and windows:
            beginning = read_beginning(read_texts({}, path, source.text_field, 0, name))
        elif path is not None:
            settings = source.model_dump()
            beginning = read_beginning(read_examples(settings, path, 0), settings["samples"])
        elif not looks_only:
            require_data_set(source.model_dump())
        where = name if path is None else f"{name} {path}"
        return Text(section, where, beginning, length, windows, add_bos_token)

    for share in calibration.shares() if "importance" in kinds else ():
        bos = config.calibrates_with_bos
        yield text("calibration", share.text, calibration.sequence_length, share.windows, bos)
    for held_out in evaluation.fidelity.each().values() if "reference" in kinds else ():
        bos = evaluation.add_bos_token
        yield text("evaluation.fidelity", held_out, held_out.sequence_length, held_out.windows, bos)
    trainings = [*config.recovery.trainings().values()] if "recover" in kinds else []
    trainings += [config.recovery.complete()] if "loraprune" in kinds else []
    reading = [training for training in trainings if training is not None and training.text != "calibration"]
    reading = [training for training in reading if training.answers == "given" or "answers" in kinds]
    for training in {str(training.row_settings()): training for training in reading}.values():
        answer_tokens = training.answer_tokens if training.answers == "dense" else 0
        yield text("recovery", training, training.sequence_length)._replace(answer_tokens=answer_tokens)


def _check_model(folder: Path, texts: Sequence[Text], needs_chat: bool) -> None:
    """Check a model's tokenizer and weights, and that each text holds a window, or a pair to train on."""
    # These import torch and transformers, which takes seconds.
    from hfprune_dist.data.instructions import check_examples
    from hfprune_dist.data.tokenizer import load_tokenizer, require_chat, require_embedded, require_eos
    from hfprune_dist.data.windows import Sampling, check_length
    from hfprune_dist.models.loading import require_own_weights

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns when stages are started from here
    checkpoint = open_checkpoint(folder)
    require_own_weights(checkpoint)
    tokenizer: Any = load_tokenizer(folder)
    require_embedded(tokenizer, checkpoint.config["vocab_size"], folder)
    if needs_chat:
        require_chat(tokenizer, folder)
    for text in texts:
        if checkpoint.max_positions is not None and text.sequence_length > checkpoint.max_positions:
            raise UserError(
                f"{text.section}.sequence_length {text.sequence_length} is more than the {checkpoint.max_positions} "
                f"positions of the model in {folder} (max_position_embeddings); choose a smaller one"
            )
    for text in texts:
        if not text.windows:
            require_eos(tokenizer, folder)
            if text.beginning is not None:
                check_examples(text.beginning, tokenizer, text.sequence_length, text.where, text.answer_tokens)
        elif text.beginning is not None:
            sampling = Sampling(text.windows, text.sequence_length, seed=0, add_bos_token=text.add_bos_token)
            check_length(text.beginning, tokenizer, sampling, text.where)

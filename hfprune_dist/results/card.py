"""The model card of a row's checkpoint, a README.md in the Hugging Face hub's format, and its recipe, the configuration
that makes the checkpoint again. Neither names paths of this machine.

The format: https://huggingface.co/docs/hub/model-cards; the metadata is written by huggingface_hub itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfprune_dist.checkpoints.checkpoint import is_licence
from hfprune_dist.config.texts import FIRST, OTHER_TEXTS, reference_role
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.planning.plan import OWN, Cell, Plan
from hfprune_dist.results.checkpoints import Contents, File, checkpoint_names
from hfprune_dist.results.formats import counted, number
from hfprune_dist.results.markdown import code, code_block, escaped, table
from hfprune_dist.results.metrics import METRICS, OF_TEXT
from hfprune_dist.results.rows import DenseModel, Row, collect_rows
from hfprune_dist.results.table import sizes
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.atomic_files import read_object
from hfprune_dist.store.stage import CUTTING, RECOVERING, Input, Stage

if TYPE_CHECKING:  # takes a while to import; commands should answer at once
    from huggingface_hub import EvalResult

CARD, RECIPE = "README.md", "recipe.yaml"
ADAPTER = "adapter"
NEEDS_CODE = "modeling_pruned.py"  # plain transformers loads it only with trust_remote_code
TASK_TYPE, TASK_NAME = "text-generation", "Text Generation"
# Metadata of a base model's card that also holds for models made from it.
_CARRIED_OVER = ("license", "license_name", "license_link", "language")
# What people call structures, where that differs.
_STRUCTURES = {"kv_groups": "KV groups"}
# Key of a manifest's configuration: name of each method of the run -> its settings.
METHOD_SETTINGS = "method_settings"


def contents_of_checkpoints(plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> dict[str, Contents | None]:
    """Name of each row's folder -> its contents; None if the row has no checkpoint (yet).

    Args:
        dense: model name -> facts about the dense checkpoint.
    """
    rows = dict(zip(plan.cells, collect_rows(plan, store, dense), strict=True))
    contents: dict[str, Contents | None] = {}
    for name, cell in checkpoint_names(plan.cells).items():
        subject = Subject.of(name, cell, rows, plan, store, dense[cell.model])
        contents[name] = None if subject is None else _contents(subject, store)
    return contents


def _contents(subject: Subject, store: Store) -> Contents:
    made, recipe = subject.cell.producers[-1], Recipe.of(subject)
    texts = {CARD: model_card(subject, recipe), **(recipe.files if recipe else {})}
    files = {name: File(it["bytes"], it["sha256"], it["mtime_ns"]) for name, it in subject.manifest["files"].items()}
    files = {name: file for name, file in files.items() if name not in texts}
    return Contents(made, store.handle(made).artifact, files, texts)


@dataclass(frozen=True)
class BaseModel:
    """The dense checkpoint that a row's comes from.

    Attributes:
        name: its name in the sweep.
        hub_id: ``org/name``; None if it is known only as a folder.
        revision: commit on the hub, None without a hub id.
        carried: metadata of its card that also holds for models made from it: licence and language.
    """

    name: str
    hub_id: str | None
    revision: str | None
    carried: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, source: Input) -> BaseModel:
        """Describe a checkpoint that stages read; of one that has been removed since, only the name is certain."""
        folder = Path(source.location)
        cached = folder.parent.parent.name  # models--org--name/snapshots/commit
        if source.content == "commit" and cached.startswith("models--"):
            hub_id = cached.removeprefix("models--").replace("--", "/")
            return cls(name, hub_id, folder.name, _carried_over(folder))
        return cls(name, None, None, _carried_over(folder))

    @property
    def licence(self) -> str | None:
        """Name of the licence, or its identifier where no name is given; None if it isn't known."""
        named = self.carried.get("license_name") or self.carried.get("license")
        return None if named is None else str(named)


def _carried_over(folder: Path) -> dict[str, Any]:
    """Licence and language from the card; the licence from config.json if the card has none."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no readable card
        metadata = {}
    config = read_object(folder / "config.json") or {}
    licence = {"license": config["license"]} if isinstance(config.get("license"), str) else {}
    stated = {key: _with_norwegian(value) for key, value in {**licence, **metadata}.items() if key in _CARRIED_OVER}
    return {key: value for key, value in stated.items() if value}


def _with_norwegian(stated: Any) -> Any:
    """A value of a card in which ``no``, the code of Norwegian, isn't taken for false, as YAML 1.1 does."""
    if isinstance(stated, list):
        return [_with_norwegian(it) for it in stated]
    return "no" if stated is False else stated


@dataclass(frozen=True)
class Subject:
    """A row's checkpoint, how it was made and how it was measured.

    Attributes:
        name: name of its folder.
        row: the row.
        dense_row: the dense model's row that was measured in the same way, if there is one.
        parameters: number of the dense model's parameters.
        has_vision: whether it is a model of images and text.
        stages: all stages behind the row, in order.
        manifest: manifest of the artifact that is the checkpoint.
        config: configuration of the run that evaluated it, else of the one that made it; empty if it wasn't recorded.
        base: the dense checkpoint.
    """

    name: str
    cell: Cell
    row: Row
    dense_row: Row | None
    parameters: int
    has_vision: bool
    stages: Sequence[Stage]
    manifest: Manifest
    config: Mapping[str, Any]
    base: BaseModel

    @classmethod
    def of(
        cls, name: str, cell: Cell, rows: Mapping[Cell, Row], plan: Plan, store: Store, dense: DenseModel
    ) -> Subject | None:
        """The checkpoint of a row; None if there is none (yet)."""
        made, row = store.handle(cell.producers[-1]), rows[cell]
        manifest = made.manifest()
        if manifest is None or not made.is_committed():
            return None
        alike = [it for other, it in rows.items() if not other.producers and other.model == cell.model]
        dense_row = next((it for it in alike if it["measured_as"] == row["measured_as"]), None)
        stages = [plan.stages[stage_id] for stage_id in plan.upstream(cell)]
        config = (store.handle(cell.evaluate).manifest() or manifest).get("config", {})
        base = BaseModel.of(cell.model, plan.stages[cell.evaluate].inputs["dense"])
        return cls(name, cell, row, dense_row, dense.parameters, dense.has_vision, stages, manifest, config, base)

    @property
    def evaluation(self) -> Stage:
        return self.stages[-1]

    @property
    def files(self) -> list[str]:
        return sorted(self.manifest["files"])

    @property
    def trained_on(self) -> Stage | None:
        """The stage of the row's recovery; None without recovery."""
        last = next(it for it in self.stages if it.id == self.cell.producers[-1])
        return last if last.kind in RECOVERING else None


@dataclass(frozen=True)
class Recipe:
    """The configuration of a sweep that makes a checkpoint again, with the same fingerprints.

    Attributes:
        files: name -> text: ``recipe.yaml``, and the method's own file if it isn't one of the project's.
        needed: name of each file or folder that has to be beside them -> digest of its content; empty if not known.
    """

    files: Mapping[str, str]
    needed: Mapping[str, str]

    @classmethod
    def of(cls, subject: Subject) -> Recipe | None:
        """The recipe of a checkpoint; None if its configuration wasn't recorded."""
        cell, recorded = subject.cell, subject.config
        if not recorded.get("methods"):
            return None
        config = {key: value for key, value in recorded.items() if key not in ("runtime", METHOD_SETTINGS)}
        base, folder = subject.base, subject.evaluation.inputs["dense"].location
        alias = {"path": folder} if base.hub_id is None else {"hub_id": base.hub_id, "revision": base.revision}
        config |= {"models": [cell.model], "aliases": {cell.model: alias}}
        config |= {} if cell.ratio is None else {"ratios": [cell.ratio]}
        named = {Path(it).stem: it for it in config["methods"]}
        method = cell.method if cell.method in named else next(iter(named))
        settings = recorded.get(METHOD_SETTINGS, {}).get(method)
        is_own = settings is not None and named[method] != method
        config["methods"] = [f"{method}.yaml" if is_own else method]
        names: dict[str, str] = {}
        config = _with_names(config, names)
        read = {it.location: it.identity for stage in subject.stages for it in stage.inputs.values()}
        needed = {name: read.get(location, "") for location, name in names.items()}
        return cls({RECIPE: to_yaml(config), **({f"{method}.yaml": to_yaml(settings)} if is_own else {})}, needed)


def _with_names(value: Any, names: dict[str, str]) -> Any:
    """Settings in which each absolute path is a name; ``names`` is filled with path -> name."""
    if isinstance(value, Mapping):
        return {key: _with_names(it, names) for key, it in value.items()}
    if isinstance(value, list):
        return [_with_names(it, names) for it in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    name = Path(value).name
    taken = [it for path, it in names.items() if path != value]
    return names.setdefault(value, name if name not in taken else f"{len(names)}-{name}")


def model_card(subject: Subject, recipe: Recipe | None) -> str:
    """The full text of the card."""
    from huggingface_hub import ModelCardData

    scores, cell, base = scores_of(subject), subject.cell, subject.base
    data = ModelCardData(
        model_name=subject.name,
        base_model=base.hub_id,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if subject.has_vision else TASK_TYPE,
        tags=["hfprune", *(["pruned", "model-compression", cell.method] if cell.method else [])],
        datasets=sorted(_datasets(subject)) or None,
        eval_results=eval_results(scores) or None,
        **base.carried,
    )
    facts = [[name, text] for name, text in _facts(subject).items() if text]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {escaped(subject.name)}",
        _summary(subject),
        table(["", ""], facts),
        "## Scores",
        scores_table(scores) if scores else "Not evaluated yet.",
        _how_to_load(subject),
        _how_it_was_made(subject, recipe),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(subject: Subject) -> str:
    cell, base = subject.cell, subject.base
    model = f"[{escaped(base.hub_id)}](https://huggingface.co/{base.hub_id})" if base.hub_id else code(base.name)
    if cell.ratio is None:
        return f"{model} with the fine-tuning that its pruned versions get: the control that they are held against."
    after = ", then fine-tuned with LoRA to recover" if subject.trained_on else ""
    after = ", while it was fine-tuned with LoRA to recover" if cell.recovery == OWN else after
    pruned = f"{100 * cell.ratio:.4g}% of its parameters pruned by the method {code(str(cell.method))}"
    return f"{model} with {pruned}{after}."


def _facts(subject: Subject) -> dict[str, str | None]:
    """Heading of each line of the table -> its text; None if it isn't known or there is nothing to say."""
    base, cell, row = subject.base, subject.cell, subject.row
    revision = f", commit `{base.revision}`" if base.revision else ""
    model = f"{escaped(base.hub_id)}{revision}" if base.hub_id else f"{code(base.name)}, a local checkpoint"
    licences = [code(name) for name in subject.files if is_licence(name)]
    unknown = f"see {', '.join(licences)}" if licences else "not known: see the base model before you share this one"
    return {
        "base model": f"{model}, {subject.parameters:,} parameters",
        "licence of the base model": escaped(base.licence) if base.licence else unknown,
        "method": cell.method and f"{code(cell.method)}: {_method(subject)}",
        "ratio asked": f"{cell.ratio:g} of all parameters" if cell.ratio is not None else None,
        "ratio reached": None if cell.ratio is None else number(row["ratio_reached"], ".4f"),
        "parameters": number(row["parameters"], ","),
        "sizes": ", ".join(f"{column.header} {column.show(row)}" for column in sizes([row])),
        "weights": f"{number(row['weight_bytes'], ',')} bytes",
        "calibration": _calibration(subject),
        "recovery": _recovery(subject) or "none",
    }


def _method(subject: Subject) -> str:
    settings = [it.params.to_json() for it in subject.stages if it.kind in CUTTING][-1]
    what = _listed([_STRUCTURES.get(it, it) for it in settings.get("structures", ["neurons"])])
    if subject.cell.recovery == OWN:
        return f"{what} go, scored by LoRA's own gradients while it recovers the model"
    distilled = ", distillation" if any(it.kind == "distill" for it in subject.stages) else ""
    return (
        f"{what} go, scored by {settings.get('criterion')}; allocation {settings.get('allocation')}, refit "
        f"{settings.get('refit')}{distilled}"
    )


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _calibration(subject: Subject) -> str | None:
    stage = next((it for it in subject.stages if it.kind == "importance"), None)
    if stage is None:
        return None
    settings = stage.params.to_json().get("calibration", {})
    texts = settings.get("mixture") or [settings]
    roles = ["calibration"] if len(texts) == 1 else [f"calibration {number}" for number in range(1, len(texts) + 1)]
    named = _listed([_text(it, stage.inputs.get(role)) for it, role in zip(texts, roles, strict=True)])
    return f"{counted(settings.get('samples'), 'window')} of {settings.get('sequence_length')} tokens of {named}"


def _recovery(subject: Subject) -> str | None:
    stage = subject.trained_on
    if stage is None:
        return None
    settings = stage.params.to_json().get("recovery", {})
    steps = settings.get("max_steps")
    length = counted(steps, "step") if steps else counted(number(settings.get("epochs"), "g"), "epoch")
    return (
        f"LoRA (r {settings.get('rank')}, alpha {settings.get('alpha')}, learning rate {settings.get('learning_rate')},"
        f" batch size {settings.get('batch_size')}, {length}) on {_text(settings, stage.inputs.get('instructions'))}, "
        "merged into the weights"
    )


def _text(settings: Mapping[str, Any], source: Input | None) -> str:
    """A text for people, in Markdown: a data set on the hub, or the name of a file.

    Args:
        settings: settings of the text, as a stage records them.
        source: the stage's input, if the text is a file.
    """
    if source is not None:
        return f"the file {code(Path(source.location).name)} (sha256 `{source.identity[:12]}`)"
    parts = [settings.get("dataset"), settings.get("name"), settings.get("split")]
    revision = f" at {escaped(settings['revision'])}" if settings.get("revision") else ""
    return code("/".join(str(part) for part in parts if part)) + revision


def _datasets(subject: Subject) -> set[str]:
    """Hub ids of the data sets on which the checkpoint was calibrated and trained."""
    settings = [it.params.to_json() for it in subject.stages if it.kind in ("importance", *RECOVERING)]
    sections = [section for it in settings for section in (it.get("calibration"), it.get("recovery")) if section]
    texts = [text for section in sections for text in section.get("mixture") or [section]]
    return {text["dataset"] for text in texts if text.get("dataset") and not Path(text["dataset"]).is_absolute()}


def _how_to_load(subject: Subject) -> str:
    trust = ", trust_remote_code=True" if NEEDS_CODE in subject.files else ""
    auto = "AutoModelForImageTextToText" if subject.has_vision else "AutoModelForCausalLM"
    lines = [
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("{subject.name}"{trust})  # this folder, or its id on the hub',
        f'tokenizer = AutoTokenizer.from_pretrained("{subject.name}")',
    ]
    text = "## How to load it\n\n" + code_block("python", "\n".join(lines))
    if trust:
        text += "\n\nNo class of transformers has its shape (layers of different sizes, matrices of low rank, biases): "
        text += f"`trust_remote_code` loads the class in `{NEEDS_CODE}`."
    if subject.trained_on and any(name.startswith(f"{ADAPTER}/") for name in subject.files):
        text += "\n\nWhat the fine-tuning added is part of these weights. `adapter/` holds it as an adapter too, "
        text += f'of {_base_of_adapter(subject)}: `PeftModel.from_pretrained(base, "{subject.name}/{ADAPTER}")`.'
    return text


def _base_of_adapter(subject: Subject) -> str:
    """The model that the adapter was trained on, which its own configuration leaves open."""
    cell, base = subject.cell, subject.base
    dense = f"`{base.hub_id}` at commit `{base.revision}`" if base.hub_id else f"the base model {code(base.name)}"
    if cell.ratio is None or cell.recovery == OWN:
        return dense + (", from before units were cut" if cell.recovery == OWN else "")
    return "the pruned model before it, which the recipe below makes with `--set recovery.method=none`"


def _how_it_was_made(subject: Subject, recipe: Recipe | None) -> str:
    """The section with versions and the command."""
    versions = _versions(subject.manifest.get("provenance", {}))
    text = f"## How it was made\n\nWith {versions}"
    if recipe is None:
        return f"{text}, by settings that were not recorded."
    beside = [
        f"{code(name)}" + (f" (sha256 `{identity[:12]}`)" if identity else "")
        for name, identity in recipe.needed.items()
    ]
    also = f" It reads, beside itself, {_listed(beside)}." if beside else ""
    command = code_block("bash", f"python launch/sweep.py --config {RECIPE}")
    return f"{text}, as the row {code(subject.cell.label)} of\n\n{command}\n\n`{RECIPE}` has all settings.{also}"


def _versions(provenance: Mapping[str, Any]) -> str:
    commit, version = provenance.get("git_commit"), provenance.get("hfprune_dist")
    made_by = "hfprune_dist" + (f" {version}" if version else "") + (f" at commit `{commit}`" if commit else "")
    changed = " with changes" if provenance.get("dirty_diff_sha256") else ""
    packages = {"Python": provenance.get("python"), **provenance.get("packages", {})}
    used = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    return made_by + changed + (f" ({used})" if used else "")


# Scores.


@dataclass(frozen=True)
class Score:
    """One number in the hub's format, its standard error, if that is known, and the dense model's value, if it was
    measured in the same way.
    """

    result: EvalResult
    error: float | None
    dense: float | None


def scores_of(subject: Subject) -> list[Score]:
    """All known scores of a checkpoint's evaluation, fidelity first."""
    return [*_fidelity(subject), *_tasks(subject)]


def _fidelity(subject: Subject) -> Iterator[Score]:
    dense = subject.dense_row or {OTHER_TEXTS: {}}
    for name, found in {FIRST: subject.row, **subject.row[OTHER_TEXTS]}.items():
        reference = subject.evaluation.inputs.get(reference_role(name))
        if reference is None:
            continue
        stage = next(it for it in subject.stages if it.id == reference.location)
        settings, source = stage.params.to_json().get("text") or {}, stage.inputs.get("text")
        windows = f"{counted(settings.get('windows'), 'window')} of {settings.get('sequence_length')} tokens"
        dataset = f"held-out text, {windows} of {_text(settings, source)}"
        keys = {"dataset": "type", "name": "config", "split": "split", "revision": "revision"}
        on_hub = {ours: settings[key] for key, ours in keys.items() if settings.get(key)}
        place = on_hub if source is None else {"type": "held-out", "config": name}
        of_dense = dense if name == FIRST else dense[OTHER_TEXTS].get(name, {})
        for metric in OF_TEXT:
            yield from _score(place, dataset, metric, METRICS[metric].told, found, of_dense)


def _tasks(subject: Subject) -> Iterator[Score]:
    settings, dense = subject.evaluation.params.to_json(), (subject.dense_row or {"tasks": {}})["tasks"]
    shots, limit = settings.get("num_fewshot"), settings.get("limit")
    how = f"lm-eval{'' if shots is None else f', {shots}-shot'}"
    how += "" if limit is None else f", at most {counted(limit, 'document')} a task"
    for task, found in subject.row["tasks"].items():
        for metric in found:
            if not metric.endswith("_stderr"):
                yield from _score(
                    {"type": task}, f"{escaped(task)} ({how})", metric, metric, found, dense.get(task, {})
                )


def _score(
    place: Mapping[str, str], dataset: str, metric: str, title: str, found: Mapping[str, Any], dense: Mapping[str, Any]
) -> Iterator[Score]:
    """The score if it is known.

    Args:
        place: type (or id), config, split and revision of the data set, as far as it has them; identifies it.
        dataset: the data set, described for people in Markdown.
        title: the metric, described for people.
    """
    from huggingface_hub import EvalResult

    if (value := found.get(metric)) is not None:
        result = EvalResult(
            task_type=TASK_TYPE,
            task_name=TASK_NAME,
            dataset_name=dataset,
            dataset_type=place["type"],
            dataset_config=place.get("config") or None,
            dataset_split=place.get("split"),
            dataset_revision=place.get("revision"),
            metric_type=metric,
            metric_name=title,
            metric_value=value,
        )
        yield Score(result, found.get(f"{metric}_stderr"), dense.get(metric))


def eval_results(scores: Sequence[Score]) -> list[EvalResult]:
    """The scores in the hub's format, in which a standard error is a metric of its own, ``<metric>_stderr``."""
    listed = []
    for it in scores:
        metric = it.result.metric_type
        listed.append(it.result)
        if it.error is not None:
            name = f"standard error of {metric}"
            listed.append(replace(it.result, metric_type=f"{metric}_stderr", metric_name=name, metric_value=it.error))
    return listed


def scores_table(scores: Sequence[Score]) -> str:
    """Markdown table of the scores, with a column for the dense model if it was measured in the same way."""
    with_dense = any(score.dense is not None for score in scores)
    lines, before = [], ""
    for it in scores:
        error = "" if it.error is None else f" ± {it.error:.2g}"
        dense = "-" if it.dense is None else f"{it.dense:.5g}"
        dataset, title = it.result.dataset_name, escaped(it.result.metric_name or "")
        lines.append(["" if dataset == before else dataset, title, f"{it.result.metric_value:.5g}{error}"])
        lines[-1] += [dense] * with_dense
        before = dataset
    return table(["on", "metric", "value", *["dense"] * with_dense], lines)

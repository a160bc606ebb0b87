"""The model card of a row's checkpoint, a README.md in the Hugging Face hub's format, and its recipe, the configuration
that makes the checkpoint again. Neither names paths of this machine.

The format: https://huggingface.co/docs/hub/model-cards; the metadata is written by huggingface_hub itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfprune_dist.checkpoints.checkpoint import is_licence
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.planning.plan import OWN, Cell, Plan
from hfprune_dist.results.checkpoints import Contents, File, checkpoint_names
from hfprune_dist.results.markdown import code, code_block, escaped, table
from hfprune_dist.results.metrics import METRICS, OF_TEXT
from hfprune_dist.results.rows import DenseModel, Row, collect_rows
from hfprune_dist.results.table import columns, notes
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.atomic_files import read_object
from hfprune_dist.store.stage import RECOVERING, Input, Stage, kind_of

if TYPE_CHECKING:  # takes a while to import; commands should answer at once
    from huggingface_hub import EvalResult

CARD, RECIPE, ADAPTER = "README.md", "recipe.yaml", "adapter"
NEEDS_CODE = "modeling_pruned.py"  # plain transformers loads it only with trust_remote_code
# Metadata of a base model's card that also holds for models made from it.
_CARRIED_OVER = ("license", "license_name", "license_link", "language")


def contents_of_checkpoints(plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> dict[str, Contents | None]:
    """Name of each row's folder -> its contents; None if the row has no checkpoint (yet).

    Args:
        dense: model name -> facts about the dense checkpoint.
    """
    rows = dict(zip(plan.cells, collect_rows(plan, store, dense), strict=True))
    contents: dict[str, Contents | None] = {}
    for name, cell in checkpoint_names(plan.cells).items():
        made = store.handle(cell.producers[-1])
        manifest = made.manifest()
        contents[name] = None
        if manifest is not None and made.is_committed():
            subject = Subject.from_cell(name, cell, rows, plan, store, dense[cell.model])
            texts = {CARD: model_card(subject), **({RECIPE: text} if (text := recipe(subject)[0]) else {})}
            facts = manifest["files"].items()
            files = {
                file: File(fact["bytes"], fact["sha256"], fact["mtime_ns"]) for file, fact in facts if file not in texts
            }
            contents[name] = Contents(made.id, made.artifact, files, texts)
    return contents


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
    def from_input(cls, name: str, source: Input) -> BaseModel:
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
        return self.carried.get("license_name") or self.carried.get("license")

    def shown(self) -> str:
        """Its name in Markdown, as exactly as it is known."""
        return f"`{self.hub_id}`, commit `{self.revision}`" if self.hub_id else f"{code(self.name)}, a local checkpoint"


def _carried_over(folder: Path) -> dict[str, Any]:
    """Licence and language from the card; the licence from config.json if the card has none."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no readable card
        metadata = {}
    stated = {"license": (read_object(folder / "config.json") or {}).get("license"), **metadata}
    known = {key: stated.get(key) for key in _CARRIED_OVER}
    return {key: value for key, value in known.items() if value and all(isinstance(part, str) for part in value)}


@dataclass(frozen=True)
class Subject:
    """A row's checkpoint, how it was made and how it was measured.

    Attributes:
        name: name of its folder.
        dense_row: the dense model's row that was measured in the same way, if there is one.
        stages: all stages behind the row, in order.
        manifest: manifest of the artifact that is the checkpoint.
        config: configuration of the run that evaluated it, else of the one that made it; empty if it wasn't recorded.
    """

    name: str
    cell: Cell
    row: Row
    dense_row: Row | None
    dense: DenseModel
    stages: Sequence[Stage]
    manifest: Manifest
    config: Mapping[str, Any]
    base: BaseModel

    @classmethod
    def from_cell(
        cls, name: str, cell: Cell, rows: Mapping[Cell, Row], plan: Plan, store: Store, dense: DenseModel
    ) -> Subject:
        row, manifest = rows[cell], store.handle(cell.producers[-1]).manifest() or {}
        alike = (found for other, found in rows.items() if not other.producers and other.model == cell.model)
        dense_row = next((found for found in alike if found["measured_as"] == row["measured_as"]), None)
        stages = [plan.stages[stage_id] for stage_id in plan.upstream(cell)]
        config = (store.handle(cell.evaluate).manifest() or manifest).get("config", {})
        base = BaseModel.from_input(cell.model, plan.stages[cell.evaluate].inputs["dense"])
        return cls(name, cell, row, dense_row, dense, stages, manifest, config, base)

    @property
    def is_trained(self) -> bool:
        """Whether the row was recovered."""
        return kind_of(self.cell.producers[-1]) in RECOVERING


def recipe(subject: Subject) -> tuple[str, list[str]]:
    """The configuration of a sweep that makes a checkpoint again, with the same fingerprints.

    Returns:
        its text, and the names of the files and folders that have to be beside it; empty if it wasn't recorded.
    """
    cell, recorded = subject.cell, subject.config
    if not recorded.get("methods"):
        return "", []
    config = {key: value for key, value in recorded.items() if key != "runtime"}
    base, folder = subject.base, subject.stages[-1].inputs["dense"].location
    alias = {"path": folder} if base.hub_id is None else {"hub_id": base.hub_id, "revision": base.revision}
    config |= {"models": [cell.model], "aliases": {cell.model: alias}}
    config["ratios"] = [] if cell.ratio is None else [cell.ratio]
    named = {Path(method).stem: method for method in config["methods"]}
    config["methods"] = [named.get(str(cell.method), config["methods"][0])]
    names: dict[str, str] = {}
    return to_yaml(_with_names(config, names)), [*names.values()]


def _with_names(value: Any, names: dict[str, str]) -> Any:
    """Settings in which each absolute path is a name; ``names`` is filled with path -> name."""
    if isinstance(value, Mapping):
        return {key: _with_names(part, names) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_names(part, names) for part in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    name = Path(value).name
    taken = [other for path, other in names.items() if path != value]
    return names.setdefault(value, name if name not in taken else f"{len(names)}-{name}")


def model_card(subject: Subject) -> str:
    """The full text of the card."""
    from huggingface_hub import ModelCardData

    cell, base, texts = subject.cell, subject.base, list(_texts(subject))
    data = ModelCardData(
        model_name=subject.name,
        base_model=base.hub_id,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if subject.dense.has_vision else "text-generation",
        tags=["hfprune", *(["pruned", "model-compression", cell.method] if cell.method else [])],
        datasets=sorted({text["dataset"] for _, text, _ in texts if text.get("dataset")}) or None,
        eval_results=list(eval_results(subject.row)) or None,
        **base.carried,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {escaped(subject.name)}",
        _summary(subject),
        table(["", ""], [[name, text] for name, text in _facts(subject).items() if text]),
        "## Scores",
        _scores(subject),
        _how_to_load(subject),
        _how_it_was_made(subject),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(subject: Subject) -> str:
    cell, base = subject.cell, subject.base
    model = f"[{escaped(base.hub_id)}](https://huggingface.co/{base.hub_id})" if base.hub_id else code(base.name)
    if cell.ratio is None:
        return f"{model} with the fine-tuning that its pruned versions get: the control that they are held against."
    after = ", then fine-tuned with LoRA to recover" if subject.is_trained else ""
    after = ", while it was fine-tuned with LoRA to recover" if cell.recovery == OWN else after
    ratio = subject.row["ratio_reached"] or cell.ratio
    return f"{model} with {100 * ratio:.3g}% of its parameters pruned by the method {code(str(cell.method))}{after}."


def _facts(subject: Subject) -> dict[str, str | None]:
    """Heading of each line of the table -> its text; None if it isn't known or there is nothing to say."""
    base, cell, texts = subject.base, subject.cell, list(_texts(subject))
    licences = [code(name) for name in sorted(subject.manifest["files"]) if is_licence(name)]
    unknown = f"see {', '.join(licences)}" if licences else "not known: see the base model before you share this one"
    calibration, recovery = (
        ", ".join(dict.fromkeys(_text(settings, source) for key, settings, source in texts if key == section))
        for section in ("calibration", "recovery")
    )
    return {
        "base model": f"{base.shown()}, {subject.dense.parameters:,} parameters",
        "licence of the base model": escaped(base.licence) if base.licence else unknown,
        "method": cell.method and code(cell.method),
        "ratio asked": f"{cell.ratio:g} of all parameters" if cell.ratio is not None else None,
        "calibrated on": calibration,
        "LoRA trained on": recovery,
    }


def _texts(subject: Subject) -> Iterator[tuple[str, Mapping[str, Any], Input | None]]:
    """Section, settings and file of each text on which the checkpoint was calibrated or trained."""
    for stage in subject.stages:
        for section, role in (("calibration", "calibration"), ("recovery", "instructions")):
            if settings := stage.params.to_json().get(section):
                texts = settings.get("mixture")
                for place, text in enumerate(texts or [settings], 1):
                    yield section, text, stage.inputs.get(f"{role} {place}" if texts else role)


def _text(settings: Mapping[str, Any], source: Input | None) -> str:
    """A text for people, in Markdown: a data set on the hub, or the name of a file."""
    if source is not None:
        return f"the file {code(Path(source.location).name)}"
    parts = [settings.get("dataset"), settings.get("name"), settings.get("split")]
    revision = f" at {escaped(settings['revision'])}" if settings.get("revision") else ""
    return code("/".join(str(part) for part in parts if part)) + revision


def _scores(subject: Subject) -> str:
    """What the tables of the sweep say of the row, beside the dense model's if that was measured in the same way."""
    rows = [subject.row, *([subject.dense_row] if subject.dense_row else [])]
    measured = [column for column in columns(rows, wide=True) if not column.is_text]
    lines = [[escaped(column.header), *(escaped(column.show(row)) for row in rows)] for column in measured]
    told = [f"- {escaped(note)}" for note in [*notes(rows), *notes(rows, wide=True)]]
    unmeasured = "Not evaluated yet.\n\n" if subject.row["status"] == "missing" else ""
    return unmeasured + table(["", "this model", "dense"][: 1 + len(rows)], lines) + "\n\n" + "\n".join(told)


def eval_results(row: Row) -> Iterator[EvalResult]:
    """All scores of a row in the hub's format."""
    from huggingface_hub import EvalResult

    texts = [("held-out", name, found) for name, found in {None: row, **row[OTHER_TEXTS]}.items()]
    tasks = [(task, None, found) for task, found in row["tasks"].items()]
    for dataset, config, found in (*texts, *tasks):
        keys = OF_TEXT if dataset == "held-out" else [key for key in found if not key.endswith("_stderr")]
        for key in keys:
            if found.get(key) is not None:
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=config or dataset,
                    dataset_config=config,
                    metric_type=key,
                    metric_name=METRICS[key].told if key in METRICS else key,
                    metric_value=found[key],
                )


def _how_to_load(subject: Subject) -> str:
    trust = ", trust_remote_code=True" if NEEDS_CODE in subject.manifest["files"] else ""
    auto = "AutoModelForImageTextToText" if subject.dense.has_vision else "AutoModelForCausalLM"
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
    if subject.is_trained and any(name.startswith(f"{ADAPTER}/") for name in subject.manifest["files"]):
        base = f"the base model, {subject.base.shown()}"
        if subject.cell.recovery == OWN:
            base += ", before units were cut"
        elif subject.cell.ratio is not None:
            base = "the pruned model before it, which the recipe below makes with `--set recovery.method=none`"
        text += "\n\nWhat the fine-tuning added is part of these weights. `adapter/` holds it as an adapter too, "
        text += f'of {base}: `PeftModel.from_pretrained(base, "{subject.name}/{ADAPTER}")`.'
    return text


def _how_it_was_made(subject: Subject) -> str:
    """The section with versions and the command."""
    found: Mapping[str, Any] = subject.manifest.get("provenance", {})
    commit = f" at commit `{found['git_commit']}`" if found.get("git_commit") else ""
    commit += " with changes" if found.get("dirty_diff_sha256") else ""
    packages = {"Python": found.get("python"), **found.get("packages", {})}
    used = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    text = f"## How it was made\n\nWith hfprune_dist {found.get('hfprune_dist', '')}{commit} ({used})"
    text_of_recipe, beside = recipe(subject)
    if not text_of_recipe:
        return f"{text}, by settings that were not recorded."
    also = f" It reads, beside itself, {', '.join(map(code, beside))}." if beside else ""
    command = code_block("bash", f"python launch/sweep.py --config {RECIPE}")
    return f"{text}, by\n\n{command}\n\n`{RECIPE}` has all settings.{also}"

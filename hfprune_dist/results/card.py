"""The model card of a row's checkpoint, a README.md in the Hugging Face hub's format, and its recipe, the configuration
that makes the checkpoint again. Neither names paths of this machine.

The format: https://huggingface.co/docs/hub/model-cards; the metadata is written by huggingface_hub itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfprune_dist.checkpoints.checkpoint import is_licence
from hfprune_dist.checkpoints.engines import loads_in
from hfprune_dist.config.load import is_hub_id
from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.engines.check import Check
from hfprune_dist.planning.plan import NONE, OWN, Cell, Plan, recovery_name
from hfprune_dist.results.checkpoints import Contents, File, checkpoint_names
from hfprune_dist.results.markdown import code, escaped, table
from hfprune_dist.results.metrics import METRICS, OF_TEXT
from hfprune_dist.results.rows import DONE, ENGINES, DenseModel, Row, collect_rows
from hfprune_dist.results.table import columns, notes
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_object
from hfprune_dist.store.stage import CUTTING, Input, kind_of

if TYPE_CHECKING:  # takes a while to import; commands should answer at once
    from huggingface_hub import EvalResult

CARD, RECIPE, ADAPTER = "README.md", "recipe.yaml", "adapter"
NEEDS_CODE = "modeling_pruned.py"  # plain transformers loads it only with trust_remote_code
# Metadata of a base model's card that also holds for models made from it.
_CARRIED_OVER = ("license", "license_name", "license_link", "language")


def contents_of_checkpoints(plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> dict[str, Contents | None]:
    """Name of each row's folder -> its contents; None if the row has no checkpoint (yet)."""
    rows = dict(zip(plan.cells, collect_rows(plan, store, dense), strict=True))
    contents: dict[str, Contents | None] = {}
    for name, cell in checkpoint_names(plan.cells).items():
        made = store.handle(cell.producers[-1])
        contents[name] = None
        if (manifest := made.manifest()) is not None and made.is_committed():
            card = Card(name, cell, rows, plan, store, dense[cell.model])
            recipe, _ = card.recipe()
            texts = {CARD: card.text(), **({RECIPE: recipe} if recipe else {})}
            files = {file: File(**facts) for file, facts in manifest["files"].items() if file not in texts}
            contents[name] = Contents(made.id, made.artifact, files, texts)
    return contents


@dataclass(frozen=True)
class BaseModel:
    """The dense checkpoint that a row's comes from: its name in the sweep; its hub id, ``org/name``, and the commit
    there, None if it is known only as a folder; metadata of its card that also holds for models made from it (licence
    and language); and what its own card names as its base model.
    """

    name: str
    hub_id: str | None
    revision: str | None
    carried: Mapping[str, Any]
    parent: Any = None

    @classmethod
    def from_input(cls, name: str, source: Input) -> BaseModel:
        """Describe a checkpoint that stages read; of one that has been removed since, only the name is certain."""
        from huggingface_hub import metadata_load

        folder = Path(source.location)
        try:
            metadata = metadata_load(folder / CARD) or {}
        except (OSError, ValueError, yaml.YAMLError):  # no readable card
            metadata = {}
        stated = {"license": (read_object(folder / "config.json") or {}).get("license"), **metadata}
        known = {key: stated.get(key) for key in _CARRIED_OVER}
        carried = {key: value for key, value in known.items() if value and all(isinstance(part, str) for part in value)}
        cached = folder.parent.parent.name  # models--org--name/snapshots/commit
        if source.content == "commit" and cached.startswith("models--"):
            return cls(name, cached.removeprefix("models--").replace("--", "/"), folder.name, carried)
        named = metadata.get("base_model")
        parents = [one for one in ([named] if isinstance(named, str) else named or []) if is_hub_id(str(one))]
        return cls(name, None, None, carried, parents or None)

    def shown(self) -> str:
        """Its name in Markdown, as exactly as it is known."""
        return f"`{self.hub_id}`, commit `{self.revision}`" if self.hub_id else f"{code(self.name)}, a local checkpoint"


class Card:
    """The card of the checkpoint of a row, which is in the folder ``name``."""

    def __init__(
        self, name: str, cell: Cell, rows: Mapping[Cell, Row], plan: Plan, store: Store, dense: DenseModel
    ) -> None:
        self.name, self.cell, self.row, self.dense = name, cell, rows[cell], dense
        self.made = store.handle(cell.producers[-1])
        self.manifest = self.made.manifest() or {}
        self.stages = [plan.stages[stage_id] for stage_id in plan.upstream(cell)]
        answers = next((store.handle(stage.id).manifest() for stage in self.stages if stage.kind == "answers"), None)
        self.answers: dict[str, Any] = answers["metrics"] if answers else {}
        # Of the run that evaluated it, else of the one that made it.
        self.config = (store.handle(cell.evaluate).manifest() or self.manifest)["config"]
        self.base = BaseModel.from_input(cell.model, plan.stages[cell.evaluate].inputs["dense"])
        # The dense model's row, if it was measured in the same way.
        alike = (found for other, found in rows.items() if not other.producers and other.model == cell.model)
        measured = (found for found in alike if found["status"] == "done")
        self.dense_row = next((found for found in measured if found["measured_as"] == self.row["measured_as"]), None)

    def recipe(self) -> tuple[str, dict[str, str]]:
        """The configuration of a sweep that makes the checkpoint again, with the same fingerprints: its text, and path
        -> name of the files and folders that have to be beside it; empty if its method or its recipe was renamed since.
        """
        cell, base, folder = self.cell, self.base, self.stages[-1].inputs["dense"].location
        alias = {"path": folder} if base.hub_id is None else {"hub_id": base.hub_id, "revision": base.revision}
        named = {Path(method).stem: method for method in self.config["methods"]}
        config = {key: value for key, value in self.config.items() if key != "runtime"} | {
            "models": [cell.model],
            "aliases": {cell.model: alias},
            "ratios": [] if cell.ratio is None or cell.rounds else [cell.ratio],
            "rounds": [*cell.rounds, cell.ratio] if cell.rounds else [],
            "methods": [named.get(str(cell.method), self.config["methods"][0])],
        }
        recipes = config["recovery"].get("recipes") or {}
        own = {name: each for name, each in recipes.items() if recovery_name(name, cell.rounds) == cell.recovery}
        has_recipe = own or not recipes or cell.recovery in (NONE, OWN)
        if cell.method not in (None, *named) or not has_recipe:
            return "", {}
        if recipes:
            without = {"method": NONE} if cell.recovery == NONE else {}
            config["recovery"] = {**config["recovery"], "recipes": own or None, **without}
        names: dict[str, str] = {}
        return to_yaml(_with_names(config, names)), names

    def text(self) -> str:
        from huggingface_hub import ModelCardData

        method = self.cell.method
        data = ModelCardData(
            model_name=self.name,
            base_model=self.base.hub_id or self.base.parent,
            library_name="transformers",
            pipeline_tag="image-text-to-text" if self.dense.has_vision else "text-generation",
            tags=["hfprune", *(["pruned", "model-compression", method] if method else [])],
            datasets=sorted({text["dataset"] for _, text, _ in self._texts() if text.get("dataset")}) or None,
            eval_results=list(eval_results(self.row)) or None,
            **self.base.carried,
        )
        parts = [
            f"---\n{data.to_yaml()}\n---\n\n# {escaped(self.name)}",
            self._summary(),
            table(["", ""], [[name, text] for name, text in self._facts().items() if text]),
            "## Scores",
            self._scores(),
            self._how_to_load(),
            *self._engines(),
            self._how_it_was_made(),
        ]
        return "\n\n".join(parts) + "\n"

    def _summary(self) -> str:
        cell, base = self.cell, self.base
        model = f"[{escaped(base.hub_id)}](https://huggingface.co/{base.hub_id})" if base.hub_id else code(base.name)
        if cell.ratio is None:
            return f"{model} with the fine-tuning that its pruned versions get: the control to compare them with."
        trained = ", while it was" if cell.recovery == OWN else ", then"
        ways = {"lora": "with LoRA ", "parts": "in parts "}
        trainings = [stage.params.to_json()["recovery"] for stage in self.stages if KINDS[stage.kind].trains]
        way = ways.get(trainings[-1]["method"], "") if trainings else ""
        if trainings and trainings[-1].get("objective", "labels") != "labels":
            way += f"towards {code(base.name)}'s own predictions "
        after = "" if cell.recovery == NONE else f"{trained} fine-tuned {way}to recover"
        ratio = self.row["ratio_reached"] or cell.ratio
        if cell.rounds:
            before = " and ".join(f"{100 * ratio:g}%" for ratio in cell.rounds)
            after = f", in rounds: {before} went first, and it was fine-tuned {way}to recover after each round"
        return (
            f"{model} with {100 * ratio:.3g}% of its parameters pruned by the method {code(str(cell.method))}{after}."
        )

    def _facts(self) -> dict[str, str | None]:
        """Heading of each line of the table -> its text; None if it isn't known or there is nothing to say."""
        base, cell = self.base, self.cell
        texts = [code(name) for name in sorted(self.manifest["files"]) if is_licence(name)]
        unknown = f"see {', '.join(texts)}" if texts else "not known: see the base model before you share this one"
        licence = base.carried.get("license_name") or base.carried.get("license")
        licence = ", ".join(licence) if isinstance(licence, list) else licence
        read: dict[str, dict[str, None]] = {"calibration": {}, "recovery": {}}
        names = self.recipe()[1]
        for section, settings, source in self._texts():
            read[section][_text(settings, source, names, self.answers)] = None
        return {
            "base model": f"{base.shown()}, {self.dense.parameters:,} parameters",
            "licence of the base model": escaped(licence) if licence else unknown,
            "method": cell.method and code(cell.method),
            "ratio asked": f"{cell.ratio:g} of all parameters" if cell.ratio is not None else None,
            "calibrated on": ", ".join(read["calibration"]),
            "trained on": ", ".join(read["recovery"]),
        }

    def _texts(self) -> Iterator[tuple[str, Mapping[str, Any], Input | None]]:
        """Section, settings and file of each text on which the checkpoint was calibrated or trained."""
        for stage in self.stages:
            for section, role in (("calibration", "calibration"), ("recovery", "text")):
                settings = stage.params.to_json().get(section)
                if settings and settings.get("text") != "calibration" and "answers" not in stage.inputs:
                    texts = settings.get("mixture")
                    for place, text in enumerate(texts or [settings], 1):
                        yield section, text, stage.inputs.get(f"{role} {place}" if texts else role)

    def _scores(self) -> str:
        """What the tables of the sweep say of the row, beside its base model's if that was measured alike."""
        rows = [self.row, *([self.dense_row] if self.dense_row else [])]
        measured = [column for column in columns(rows, wide=True) if not column.is_text]
        lines = [[escaped(column.header), *(escaped(column.show(row)) for row in rows)] for column in measured]
        told = "\n".join(f"- {escaped(note)}" for note in notes(rows, wide=True))
        unmeasured = "" if self.row["status"] == DONE else "Not evaluated yet.\n\n"
        return f"{unmeasured}{table(['', 'this model', 'base model'][: 1 + len(rows)], lines)}\n\n{told}"

    def _how_to_load(self) -> str:
        files, trust = self.manifest["files"], ", trust_remote_code=True"
        needs_code = NEEDS_CODE in files
        auto = "AutoModelForImageTextToText" if self.dense.has_vision else "AutoModelForCausalLM"
        lines = [
            "```python",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("{self.name}"{trust if needs_code else ""})  # this folder, or its hub id',
            f'tokenizer = AutoTokenizer.from_pretrained("{self.name}")',
            "```",
        ]
        text = "## How to load it\n\n" + "\n".join(lines)
        if needs_code:
            text += (
                "\n\nNo class of transformers has its shape (layers of different sizes, matrices of low rank, biases): "
            )
            text += f"`trust_remote_code` loads the class in `{NEEDS_CODE}`."
        if self.cell.recovery != NONE and any(name.startswith(f"{ADAPTER}/") for name in files):
            base = f"the base model, {self.base.shown()}"
            if self.cell.recovery == OWN:
                base += ", before units were cut"
            elif self.cell.rounds:
                cut = next(made for made in reversed(self.cell.producers) if kind_of(made) in CUTTING)
                base = f"the pruned model before it, which the recipe below leaves in its sweep's `store/{cut}`"
            elif self.cell.ratio is not None:
                base = "the pruned model before it, which the recipe below makes with `--set recovery.method=none`"
            text += "\n\nWhat the fine-tuning added is part of these weights. `adapter/` holds it as an adapter too, "
            text += f'of {base}: `PeftModel.from_pretrained(base, "{self.name}/{ADAPTER}")`.'
        return text

    def _engines(self) -> Iterator[str]:
        """The section with what a check in engines found, and whether the others hold its shape."""
        if config := read_object(self.made.artifact / "config.json"):
            found = {name: escaped(Check(**found).line()) for name, found in self.row[ENGINES].items()}
            lines = [f"- {name}: {told}" for name, told in (loads_in(config) | found).items()]
            yield "\n".join(["## What loads it", "", f"For engines that support `{config['model_type']}`:", "", *lines])

    def _how_it_was_made(self) -> str:
        made: Mapping[str, Any] = self.manifest.get("provenance", {})
        commit = f" at commit `{made['git_commit']}`" if made.get("git_commit") else ""
        commit += " with changes" if made.get("dirty_diff_sha256") else ""
        packages = {"Python": made.get("python"), **made.get("packages", {})}
        used = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        text = f"## How it was made\n\nWith hfprune_dist {made.get('hfprune_dist', '')}{commit} ({used})"
        recipe, names = self.recipe()
        if not recipe:
            return f"{text}, by a method or a recipe that has been renamed since."
        also = f" It reads, from its own folder, {', '.join(map(code, names.values()))}." if names else ""
        command = f"```bash\npython launch/sweep.py --config {RECIPE}\n```"
        return f"{text}, by\n\n{command}\n\n`{RECIPE}` has all settings.{also}"


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


def _text(
    settings: Mapping[str, Any], source: Input | None, names: Mapping[str, str], answers: Mapping[str, Any]
) -> str:
    """A text for people, in Markdown: a data set on the hub, or the name of a file, which the recipe may have given."""
    answered = ", its instructions answered by the base model" if settings.get("answers") == "dense" else ""
    if answered and answers:
        answered += " in {engine} ({pairs:,} answers, {unfinished_pairs:,} of them cut; {dropped_pairs:,} instructions "
        answered = f"{answered}left out)".format_map(answers)
    if source is not None:
        return f"the file {code(names.get(source.location, Path(source.location).name))}{answered}"
    parts = [settings.get("dataset"), settings.get("name"), settings.get("split")]
    revision = f" at {escaped(settings['revision'])}" if settings.get("revision") else ""
    return code("/".join(str(part) for part in parts if part)) + revision + answered


def eval_results(row: Row) -> Iterator[EvalResult]:
    """All scores of a row in the hub's format."""
    from huggingface_hub import EvalResult

    texts = [
        ("held-out", name, {key: found.get(key) for key in OF_TEXT})
        for name, found in {None: row, **row[OTHER_TEXTS]}.items()
    ]
    tasks = [(task, None, found) for task, found in row["tasks"].items()]
    for dataset, config, found in (*texts, *tasks):
        for key, value in found.items():
            if value is not None and not key.endswith("_stderr"):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset,
                    dataset_name=config or dataset,
                    dataset_config=config,
                    metric_type=key,
                    metric_name=METRICS[key].told if dataset == "held-out" else key,
                    metric_value=value,
                )

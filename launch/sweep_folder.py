"""Files in a sweep's folder next to its store: its configuration, the plan of all its rows, the tables, the report."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from hfprune_launch.project import PROJECT
from hfprune_launch.screen import say, show_checkpoints, show_results
from rich.console import Console

from hfprune_dist.config.load import load_config
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import UNPRINTABLE
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import Plan, with_earlier_rows, without_rows
from hfprune_dist.report.page import page
from hfprune_dist.results.card import contents_of_checkpoints
from hfprune_dist.results.checkpoints import Update, update_checkpoints
from hfprune_dist.results.rows import DenseModel, Row, collect_rows
from hfprune_dist.results.table import RESULTS, write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import listed, read_json, write_json, write_text
from hfprune_dist.store.claims import locked
from hfprune_dist.store.stage import Stage

SWEEP_FILE = "sweep.json"
CONFIG_FILE = "config.yaml"
REPORT = "report.html"
LOCK = ".lock"
NO_RUN = "no run yet"


@dataclass(frozen=True)
class Sweep:
    """A sweep's plan, with its store and folder."""

    plan: Plan
    store: Store
    out: Path
    dense: Mapping[str, DenseModel] = field(default_factory=dict)  # by model; rows can't be collected without them

    def rows(self) -> list[Row]:
        """The rows that the store has for the plan by now."""
        return collect_rows(self.plan, self.store, self.dense)

    def write_checkpoints(self) -> Update:
        """Bring the named checkpoints in the folder up to date."""
        try:
            return update_checkpoints(self.out, contents_of_checkpoints(self.plan, self.store, self.dense))
        except OSError as error:  # the results are complete all the same
            return Update({}, [f"named checkpoints can't be written ({error}); those in {self.store.root} are whole"])

    def write_results(self, console: Console, wide: bool = False) -> list[str]:
        """Write the named checkpoints, the tables, whose rows name them, and the report; then show them. Return the
        names of the files that were written.
        """
        update = self.write_checkpoints()
        rows = self.rows()
        write_reports(rows, self.out)
        written = [*RESULTS, *[REPORT] * write_page(self.out, console)]
        # Shown once all is written, as a reader such as head may end the command.
        show_results(console, rows, wide)
        show_checkpoints(console, update)
        return written

    def write_record(self) -> None:
        """Write the plan as that of all rows of the folder."""
        dense = {name: asdict(facts) for name, facts in self.dense.items()}
        write_json(self.out / SWEEP_FILE, {**self.plan.to_json(), "dense": dense})


def recorded_sweep(out: Path) -> Sweep | None:
    """The sweep of the last run in a folder, with all rows; None if there was none. A damaged record is a UserError."""
    try:
        record = read_json(out / SWEEP_FILE)
        if record is None:
            return None
        dense = {name: DenseModel(**facts) for name, facts in record["dense"].items()}
        plan = Plan.from_json(record)
        if not all(cell.model in dense and {*plan.upstream(cell)} <= plan.stages.keys() for cell in plan.cells):
            raise KeyError("a row's model or stage")
    except (ValueError, TypeError, KeyError, AttributeError, UserError):
        raise UserError(
            f"{out / SWEEP_FILE}: damaged or another version's; remove it, and the sweep makes only what is missing"
        ) from None
    return Sweep(plan, Store(out / "store"), out, dense)


def read_sweep(out: Path) -> Sweep:
    """The sweep left by the last run in a folder; raise UserError if the folder is not a sweep's."""
    sweep = recorded_sweep(out)
    if sweep is None:
        raise UserError(f"{out}: no {SWEEP_FILE}; give the folder of a sweep that has been started")
    return sweep


def write_page(out: Path, console: Console) -> bool:
    """Write the report on all rows of a folder, and return whether it was written; if that fails, a note says why, as
    the results are complete.
    """
    try:
        sweep = read_sweep(out)
        write_text(out / REPORT, page(out, sweep.plan, sweep.rows(), time.time()))
    except Exception as error:  # whatever is wrong with the report, the sweep is fine
        say(console, f"note: {out / REPORT} can't be written ({type(error).__name__}: {error})")
        return False
    return True


def record_run(today: Sweep, config: SweepConfig, models: Sequence[ModelSource]) -> None:
    """Write a run's configuration, valid in any folder, and its rows, in place of earlier ones of the same cells."""
    out, plan = today.out, today.plan
    write_text(out / CONFIG_FILE, to_yaml(config.model_dump() | {"models": [model.spelling for model in models]}))
    dense = {model.name: DenseModel.from_checkpoint(model.checkpoint) for model in models}
    with locked(out / LOCK):  # what other commands would change meanwhile
        if (earlier := recorded_sweep(out)) is not None:
            plan, dense = with_earlier_rows(plan, earlier.plan), {**earlier.dense, **dense}
        replace(today, plan=plan, dense=dense).write_record()


def forget_rows(out: Path, labels: Sequence[str]) -> Sweep:
    """Remove rows from a folder's record, and return what is left; raise UserError if there is no such row."""
    read_sweep(out)  # nothing is written where no sweep has run
    with locked(out / LOCK):
        sweep = read_sweep(out)
        known = [cell.label for cell in sweep.plan.cells]
        for label in labels:
            if label not in known:
                hint = did_you_mean(label, known)
                raise UserError(f"--forget: no row {label!r} in {out}{hint}; rows: {', '.join(known) or 'none'}")
        left = replace(sweep, plan=without_rows(sweep.plan, labels))
        left.write_record()
    return left


def require_folder(out: Path) -> None:
    """Raise UserError if a folder can't be created or written to, as far as that is seen without writing anything."""
    nearest = next(place for place in (out.absolute(), *out.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {nearest} is not a folder that can be written to; choose another folder")
    if UNPRINTABLE.search(str(out.absolute())):  # nor can what is not UTF-8 be written to files of text
        raise UserError(f"{str(out.absolute())!r}: its name can't be printed; choose another folder")


def require_apart(out: Path, plan: Plan) -> None:
    """Refuse a sweep's folder that a stage reads, or that lies in one whose subfolders are read as well."""
    place = out.resolve()
    for source in (source for stage in plan.stages.values() for source in stage.inputs.values() if source.content):
        read = Path(source.location).resolve()
        if place == read or (source.content != "text" and read in place.parents):
            raise UserError(f"{out}: stages read what is in {read}; choose a folder outside of it")


def configuration(out: Path, files: Sequence[Path], overrides: Mapping[str, Any]) -> tuple[SweepConfig, str]:
    """Return the configuration of a run, and a remark on where it comes from (empty if that is obvious); refuse bad
    input. Without ``files``, ``overrides`` are applied to the configuration of the last run in the folder.
    """
    own = out / CONFIG_FILE
    if not files and not own.is_file() and "models" not in overrides and (out / SWEEP_FILE).is_file():
        raise UserError(f"{own} is missing, the configuration of this folder's last run; give --config or --models")
    if own.is_file() and not ((out / "store").is_dir() or (out / SWEEP_FILE).is_file()):
        raise UserError(f"{own}: not a sweep's, and a sweep would replace it; rename it, or choose another folder")
    if files or not own.is_file():
        return load_config(files, overrides, PROJECT.configs), ""
    laid_over = ", overridden by this command's settings" if overrides else ""
    return load_config([own], overrides), f"configuration: {own}, of the last run in this folder{laid_over}"


def measured_hours(plan: Plan, store: Store) -> Callable[[Stage], float | None]:
    """Return what tells how long finished stages of a kind and model took on average; None if there are none."""
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind in {stage.kind for stage in plan.stages.values()}:
        for folder in listed(store.root / kind, "[!.]*"):
            manifest = store.handle(f"{kind}/{folder.name}").manifest()
            if manifest is not None and manifest.get("wall_time_s") is not None:
                took[kind, manifest["stage"]["label"].split()[0]].append(manifest["wall_time_s"] / 3600)
    # A label begins with the model, as in "llama 0.2 hfprune".
    average = {kind_and_model: fmean(hours) for kind_and_model, hours in took.items()}
    return lambda stage: average.get((stage.kind, stage.label.split()[0]))

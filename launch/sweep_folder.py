"""Files in a sweep's folder next to its store: the configuration, the plan of all its rows, and the tables."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfprune_launch.project import PROJECT
from pydantic import TypeAdapter

from hfprune_dist.config.load import load_config
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.yaml_text import read_yaml, to_yaml
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.kinds.placement import with_micro_batches
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import Cell, Plan, without_rows
from hfprune_dist.results.card import contents_of_checkpoints
from hfprune_dist.results.checkpoints import Update, update_checkpoints
from hfprune_dist.results.rows import DenseModel, Row, collect_rows
from hfprune_dist.results.table import write_reports
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import locked, read_json, rename_aside, write_json, write_text
from hfprune_dist.store.stage import CUTTING, kind_of

SWEEP_FILE = "sweep.json"
CONFIG_FILE = "config.yaml"
LOCK = ".lock"


@dataclass(frozen=True)
class Sweep:
    """A sweep's plan, with its store and folder."""

    plan: Plan
    store: Store
    out: Path


@dataclass(frozen=True)
class Record:
    """The rows of a folder, including those of earlier runs, and the stages behind them.

    Attributes:
        dense: model name -> facts of the dense checkpoint.
    """

    plan: Plan
    dense: Mapping[str, DenseModel]

    def rows(self, store: Store) -> list[Row]:
        return collect_rows(self.plan, store, self.dense)

    def write_checkpoints(self, out: Path) -> Update:
        """Bring the named checkpoints in the record's folder up to date."""
        store = Store(out / "store")
        try:
            return update_checkpoints(out, contents_of_checkpoints(self.plan, store, self.dense))
        except OSError as error:  # the results are complete all the same
            return Update({}, [f"named checkpoints can't be written ({error}); those in {store.root} are whole"])


def read_record(out: Path) -> Record | None:
    """Read the record left by the last run in a folder; None if there was no run.

    Raises:
        UserError: if it is damaged.
    """
    try:
        record = read_json(out / SWEEP_FILE)
        if record is None:
            return None
        dense = {name: DenseModel(**facts) for name, facts in record["dense"].items()}
        plan = Plan.from_json(record)
        if not all(cell.model in dense and {*plan.upstream(cell)} <= plan.stages.keys() for cell in plan.cells):
            raise KeyError("a row's model or stage")
        _require_types(plan.cells, dense.values())
        return Record(plan, dense)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{out / SWEEP_FILE}: damaged; run the sweep again, it makes only what is missing") from None


def _require_types(cells: Sequence[Cell], dense: Iterable[DenseModel]) -> None:
    """Check the values of rows and models, of which dataclasses take any.

    Raises:
        ValueError: if one is of another type, isn't finite, or if a row has a ratio and no stage that prunes.
    """
    for kind, values in ((Cell, cells), (DenseModel, dense)):
        written = json.dumps([asdict(it) for it in values], allow_nan=False)
        TypeAdapter(list[kind]).validate_json(written, strict=True)  # type: ignore[valid-type]
    if not all(cell.ratio is None or CUTTING.intersection(map(kind_of, cell.producers)) for cell in cells):
        raise ValueError("a row with a ratio is pruned")


@dataclass(frozen=True)
class RecordedSweep:
    """A sweep as recorded in its folder by its last run, with the rows that the store has for it by now."""

    folder: Path
    record: Record
    rows: list[Row]

    @property
    def plan(self) -> Plan:
        return self.record.plan


def read_sweep(out: Path) -> RecordedSweep:
    """Read the record left by the last run, and collect its rows.

    Raises:
        UserError: if the folder is not a sweep's.
    """
    record = _require_record(out)
    return RecordedSweep(out, record, record.rows(Store(out / "store")))


def planned_sweep(out: Path) -> Sweep:
    """Return the sweep as planned by the last run.

    Raises:
        UserError: if the folder is not a sweep's.
    """
    return Sweep(_require_record(out).plan, Store(out / "store"), out)


def _require_record(out: Path) -> Record:
    record = read_record(out)
    if record is None:
        raise UserError(f"{out}: no {SWEEP_FILE}; give the folder of a sweep that has been started")
    return record


def write_record(out: Path, record: Record) -> None:
    dense = {name: asdict(facts) for name, facts in record.dense.items()}
    write_json(out / SWEEP_FILE, {**record.plan.to_json(), "dense": dense})


def record_locked(out: Path) -> AbstractContextManager[None]:
    """Keep other commands from changing a folder's record; what they would change has to be read after this."""
    return locked(out / LOCK)


def set_record_aside(out: Path) -> str:
    """Rename a record that can't be read, and return its new name."""
    return rename_aside(out / SWEEP_FILE, "unread").name


def forget_rows(out: Path, labels: Sequence[str]) -> tuple[list[Row], Update]:
    """Remove rows from a folder's record, tables and named checkpoints; the store stays as it is.

    Returns:
        the remaining rows, and the changes to the named checkpoints.

    Raises:
        UserError: if there is no such row.
    """
    _with_all_rows(out, labels)  # nothing is written unless they are there
    with record_locked(out):
        record = _with_all_rows(out, labels)
        left = Record(without_rows(record.plan, labels), record.dense)
        write_record(out, left)
    update = left.write_checkpoints(out)
    rows_left = left.rows(Store(out / "store"))
    write_reports(rows_left, out)
    return rows_left, update


def _with_all_rows(out: Path, labels: Sequence[str]) -> Record:
    record = read_record(out)
    known = [cell.label for cell in record.plan.cells] if record else []
    for label in labels:
        if label not in known:
            rows = f"rows: {', '.join(known)}" if known else "the folder has no rows"
            raise UserError(f"--forget: no row {label!r} in {out}{did_you_mean(label, known)}; {rows}")
    assert record is not None
    return record


def require_folder(out: Path) -> None:
    """Check that a folder can be created and written to, as far as that can be seen without writing anything.

    Raises:
        UserError: if a file is in its way, it can't be written to, or its name isn't UTF-8.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UserError(f"--out {str(out)!r}: its name isn't UTF-8; choose another folder") from None
    nearest = next(it for it in (out.absolute(), *out.absolute().parents) if os.path.lexists(it))
    if not nearest.is_dir():
        raise UserError(f"--out {out}: can't be written to, {nearest} is not a folder; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {nearest} can't be written to; choose another --out")


def require_apart(out: Path, plan: Plan) -> None:
    """Check that a sweep's own files don't become part of what it reads.

    Raises:
        UserError: if ``out`` is a folder that a stage reads, or lies in one whose subfolders are read as well.
    """
    place = out.resolve()
    for source in (source for stage in plan.stages.values() for source in stage.inputs.values() if source.content):
        read = Path(source.location).resolve()
        if place == read or (source.content != "text" and read in place.parents):
            raise UserError(f"--out {out}: the sweep reads what is in {read}; choose a folder outside of it")


def require_sweep(out: Path) -> None:
    """Check that a folder is a sweep's.

    Raises:
        UserError: if no sweep has been run there.
    """
    if not (out / SWEEP_FILE).is_file() and not (out / CONFIG_FILE).is_file():
        raise UserError(f"{out}: no sweep has been run there; give its folder with --out, or its --config")


def write_config(out: Path, config: SweepConfig, models: Sequence[ModelSource]) -> None:
    """Write the resolved configuration, in which models are named so that they can be found from any folder."""
    names = [model.spelling for model in models]
    write_text(out / CONFIG_FILE, to_yaml(config.model_dump() | {"models": names}))


def configuration(out: Path, files: Sequence[Path], overrides: Mapping[str, Any]) -> tuple[SweepConfig, str]:
    """Return the configuration of a run, and a remark on where it comes from (empty if that is obvious).

    Without ``files``, ``overrides`` are applied to the configuration of the last run in the folder.

    Raises:
        UserError: for bad input.
    """
    own = out / CONFIG_FILE
    if not files and not own.is_file() and "models" not in overrides and (out / SWEEP_FILE).is_file():
        raise UserError(f"{own} is missing, the configuration of this folder's last run; give --config or --models")
    if files or not own.is_file():
        return with_micro_batches(load_config(files, overrides, PROJECT.configs), _chosen_micro_batches(own)), ""
    try:
        if "models" not in read_yaml(own, "configuration", "keys and values at the top level"):
            raise UserError(f"{own}: damaged, it doesn't name any models")
        load_config([own], {})
    except UserError as error:
        raise UserError(
            f"{error}\n{own} is what the last run in this folder was configured with: mend it, remove it, or give "
            "--config"
        ) from None
    laid_over = ", with this command's settings over it" if overrides else ""
    config = with_micro_batches(load_config([own], overrides), _chosen_micro_batches(own))
    return config, f"configuration: {own}, of the last run in this folder{laid_over}"


def _chosen_micro_batches(own: Path) -> dict[str, int]:
    """Section -> the micro-batch size that the last run in a folder trained with; empty if the file is damaged."""
    if not own.is_file():
        return {}
    try:
        raw = read_yaml(own, "configuration", "keys and values at the top level")
    except UserError:
        return {}
    sizes = {name: section.get("micro_batch_size") for name, section in raw.items() if isinstance(section, dict)}
    return {name: size for name, size in sizes.items() if isinstance(size, int) and size > 0}

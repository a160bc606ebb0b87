"""Implementation of launch/compare.py: rows of several sweeps -> comparison.md and comparison.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfprune_launch.screen import SAID_OF_WIDE, make_console, say, show_table, table_of
from hfprune_launch.sweep_folder import CONFIG_FILE, Sweep, read_sweep, require_folder

from hfprune_dist.config.load import load_config
from hfprune_dist.config.section import as_written
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.results.comparison import columns_of_methods, compare_methods, methods_table, note_on_methods
from hfprune_dist.results.markdown import escaped
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import not_comparable
from hfprune_dist.store.atomic_files import write_json, write_text

REFERENCE = "hfprune"  # unless another method is named
# What rows of one label may differ in: what other rows there are, where a sweep ran, and what suits its machine.
MAY_DIFFER = r"(models|aliases|ratios|methods|importance\.criteria|runtime|efficiency)\b|.*micro_batch_size$"


def compare(folders: Sequence[Path], out: Path, named: str | None, wide: bool) -> None:
    """Compare the finished cells of several sweeps, with the method ``named`` as the reference.

    Args:
        wide: show all columns of the table of methods.

    Raises:
        UserError: if sweeps can't be compared, none has a finished cell, or none has the method ``named``.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: one folder is given twice; give each sweep once")
    sweeps = [(sweep, sweep.rows()) for sweep in map(read_sweep, folders)]
    _refuse_other_settings(folders)
    require_folder(out)
    reference = REFERENCE if named is None else named
    methods = compare_methods([rows for _, rows in sweeps], reference)
    if not methods:
        raise UserError(f"{', '.join(map(str, folders))}: no cell is finished; run the sweeps first")
    names = sorted({row["method"] for row in methods})
    if named is not None and named not in names:
        raise UserError(f"--reference: no method {named!r}{did_you_mean(named, names)}; valid: {', '.join(names)}")
    warnings = _warnings(sweeps)
    out.mkdir(parents=True, exist_ok=True)
    record = {"methods": methods, "sweeps": [str(it) for it in folders]}
    write_json(out / "comparison.json", record, sort_keys=False)
    parts = [f"# Methods\n\n{methods_table(methods, reference)}", *(f"{escaped(it)}\n" for it in warnings)]
    write_text(out / "comparison.md", "\n".join(parts))
    console = make_console()
    show_table(console, table_of(methods, columns_of_methods(methods, reference, wide)), wide)
    for text in [note_on_methods(methods, reference, wide), *([] if wide else [SAID_OF_WIDE]), *warnings]:
        say(console, text)
    say(console, f"written: {out / 'comparison.md'}, comparison.json")


def _refuse_other_settings(sweeps: Sequence[Path]) -> None:
    """Refuse sweeps that differ in more than the seed, since their mean would be one of seeds; and that don't even
    differ in the seed.
    """
    known: dict[int, Path] = {}
    first = _settings(sweeps[0])
    for out in sweeps:
        settings = _settings(out)
        if (other := known.setdefault(settings.pop("seed"), out)) != out:
            raise UserError(f"{out}: its seed is that of {other}; compare sweeps that differ in it (--set seed=1)")
        for key, value in settings.items():
            if value != first[key]:
                raise UserError(
                    f"{out} differs from {sweeps[0]} in more than the seed: {key} is {as_written(value)}, not "
                    f"{as_written(first[key])}; run both with one configuration"
                )


def _settings(out: Path) -> dict[str, Any]:
    """Key -> value of all settings of a folder's last run that rows with one label should share, and its seed."""
    found = _flat(load_config([out / CONFIG_FILE], {}).model_dump())
    return {key: value for key, value in found if not re.match(MAY_DIFFER, key)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting under its name, with those of its section in front."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _warnings(sweeps: Sequence[tuple[Sweep, Sequence[Row]]]) -> list[str]:
    """Name the rows without a result, which the table leaves out, and why; and the finished ones whose scores can't be
    compared with their model's first one, as of other held-out text.
    """
    rows = [{**row, "label": f"{sweep.out}: {row['label']}"} for sweep, found in sweeps for row in found]
    lost = [f"missing: {row['label']}: {row['cause']}" for row in rows if row["status"] == "missing"]
    return [*lost, *not_comparable([row for row in rows if row["status"] == "done"])]

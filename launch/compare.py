"""Compare methods across sweeps that differ in their seed; runs nothing.

example:  python launch/compare.py runs/fidelity/0 runs/fidelity/1 runs/fidelity/2 --out runs/fidelity

The last runs in their folders must have the same settings, except for the seed, models, ratios and methods; --forget
rows with other settings. Writes comparison.md and comparison.json: for each method, the mean and
standard deviation of KL to the dense model, agreement, perplexity and the average of tasks, and time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from start import start

    start(__file__)

from hfprune_launch.command import command, make_parser, path_given
from hfprune_launch.screen import make_console, say, show_table, table_of
from hfprune_launch.sweep_folder import CONFIG_FILE, read_sweep, require_folder

from hfprune_dist.config.load import load_config
from hfprune_dist.config.section import as_written
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.results.comparison import compare_methods, methods_table
from hfprune_dist.results.markdown import escaped, markdown
from hfprune_dist.results.rows import DONE
from hfprune_dist.results.table import not_comparable
from hfprune_dist.store.atomic_files import write_json, write_text

REFERENCE = "hfprune"  # unless another method is named
# What rows of one label may differ in: what other rows there are, where a sweep ran, and what suits its machine.
MAY_DIFFER = r"(models|aliases|ratios|methods|importance\.criteria|runtime|efficiency)\b|.*micro_batch_size$"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compare the finished cells of several sweeps, write and show."""
    parser = make_parser(__doc__)
    parser.add_argument("sweeps", metavar="SWEEP", type=path_given, nargs="+", help="folders of sweeps")
    parser.add_argument("--out", type=path_given, required=True, help="folder for comparison.md and comparison.json")
    parser.add_argument("--reference", help="the method whose KL the others are divided by; default: hfprune")
    arguments = parser.parse_args(argv)
    folders, out, named = arguments.sweeps, arguments.out, arguments.reference
    given = ", ".join(map(str, folders))
    if len({place.resolve() for place in folders}) < len(folders):
        raise UserError(f"{given}: one folder is given twice; give each sweep once")
    sweeps = [read_sweep(place).rows() for place in folders]
    _refuse_other_settings(folders)
    require_folder(out)
    reference = named or REFERENCE
    methods = compare_methods(sweeps, reference)
    if not methods:
        raise UserError(f"{given}: no row is finished; run the sweeps first")
    names = sorted({row["method"] for row in methods} - {"dense"})
    if named is not None and named not in names:
        raise UserError(f"--reference: no method {named!r}{did_you_mean(named, names)}; valid: {', '.join(names)}")
    named_rows = zip(folders, sweeps, strict=True)
    rows = [{**row, "label": f"{place}: {row['label']}"} for place, found in named_rows for row in found]
    # Rows that the table leaves out, and those whose scores are of other held-out text than their model's first one.
    warnings = [f"missing: {row['label']}: {row['cause']}" for row in rows if row["status"] != DONE]
    warnings += not_comparable(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "comparison.json", {"methods": methods, "sweeps": [*map(str, folders)]}, sort_keys=False)
    shown, told = methods_table(methods, reference, wide=True)
    parts = [f"# Methods\n\n{markdown(methods, shown)}", *(f"{escaped(text)}\n" for text in (told, *warnings))]
    write_text(out / "comparison.md", "\n".join(parts))
    console = make_console()
    shown, told = methods_table(methods, reference, wide=False)
    show_table(console, table_of(methods, shown))
    for text in (told, *warnings):
        say(console, text)
    say(console, f"written: {out / 'comparison.md'}, comparison.json")
    return 0


def _refuse_other_settings(sweeps: Sequence[Path]) -> None:
    """Refuse sweeps that differ in more than the seed, or not in the seed."""
    known: dict[int, Path] = {}
    first: dict[str, Any] = {}
    for out in sweeps:
        settings = dict(_flat(load_config([out / CONFIG_FILE], {}).model_dump()))
        if (other := known.setdefault(settings.pop("seed"), out)) != out:
            raise UserError(f"{out}: its seed is that of {other}; compare sweeps that differ in it (--set seed=1)")
        first = first or settings
        for key in first | settings:
            if not re.match(MAY_DIFFER, key) and settings.get(key) != first.get(key):
                values = f"{key} is {as_written(settings.get(key))}, not {as_written(first.get(key))}"
                more = f"{out} differs from {sweeps[0]} in more than the seed: {values}"
                raise UserError(f"{more}; run both with one configuration")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting under its name, with those of its section in front."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

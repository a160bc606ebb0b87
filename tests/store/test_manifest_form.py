"""What no version of the code has written into a manifest is damage: tables and cards are made all the same."""

import copy
import itertools
import json
import math

import pytest
from drawn_sweep import DrawnSweep

from hfprune_dist.results.card import contents_of_checkpoints
from hfprune_dist.results.comparison import compare_methods, methods_table
from hfprune_dist.results.rows import collect_rows
from hfprune_dist.results.table import flat_row, report
from hfprune_dist.store.artifacts import Store

GONE = object()
# Parts of a manifest that drawn ones lack.
ELSE = {"files": {"model.safetensors": {"bytes": 1, "mtime_ns": 1, "sha256": "0"}}, "device": "cpu", "attempts": 2}
ELSE |= {"world_size": 2, "peak_memory_bytes": 3, "stage": {"inputs": {"model": {"location": "/m"}}}}


def places(value, above=()):
    """Yield the keys that lead to each value within a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    for key in keys:
        yield (*above, key)
        yield from places(value[key], (*above, key))


def changed(value, place, other):
    """Return a copy of a JSON value with another value at a place, or with none."""
    value = copy.deepcopy(value)
    *above, last = place
    inner = value
    for key in above:
        inner = inner[key]
    if other is GONE:
        del inner[last]
    else:
        inner[last] = other
    return value


def show(sweep):
    """Make all that people read of a sweep, and return what became of its rows."""
    store = Store(sweep.out / "store")
    rows = collect_rows(sweep.plan, store, sweep.dense)
    json.dumps([rows, [flat_row(row) for row in rows]], allow_nan=False)
    report(rows)
    methods_table(compare_methods([rows], "hfprune"), "hfprune")
    contents_of_checkpoints(sweep.plan, store, sweep.dense)
    return [row["cause"] for row in rows]


@pytest.mark.parametrize("kind", ["importance", "prune", "recover", "evaluate", "efficiency"])
def test_everything_is_shown_whatever_a_manifest_holds(tmp_path, kind):
    sweep = DrawnSweep(tmp_path / "out", methods=("hfprune",), ratios=(0.2,), timed=True)
    *_, file = sorted((sweep.out / "store" / kind).glob("*/manifest.json"))
    whole = json.loads(file.read_text()) | ELSE
    file.write_text(json.dumps(whole))
    assert set(show(sweep)) == {None}, "as it is written, it is whole"
    for place, wrong in zip(places(whole), itertools.cycle((None, "text", math.nan, {}, 1e300))):
        for other in (GONE, wrong):
            file.write_text(json.dumps(changed(whole, place, other)))
            show(sweep)
    file.write_text(json.dumps(whole | {"finished": 1e300}))
    show(sweep)
    file.write_text(json.dumps(whole | {"wall_time_s": "60"}))
    told = f"{file.parent}: manifest.json is missing or damaged; run the sweep again, which makes it anew"
    assert told in show(sweep) or kind in ("importance", "efficiency"), "rows stand without these"

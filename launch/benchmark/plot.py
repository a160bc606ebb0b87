"""Drawing the charts of a benchmark as one picture; matplotlib comes with the optional extra ``bench``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hfprune_launch.benchmark.results import Chart

COLUMNS = 3


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(charts: Sequence[Chart], file: Path) -> None:
    """Draw every chart on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(charts) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(5 * COLUMNS, 3.6 * rows), squeeze=False)
    for place, chart in zip(axes.flat, charts, strict=False):
        for name, values in chart.curves.items():
            place.plot(chart.x, values, marker="o", label=name)
        place.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        place.set_xscale("log", base=2)
        place.set_yscale("log", base=2)
        place.legend()
    for place in axes.flat[len(charts) :]:
        place.remove()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)

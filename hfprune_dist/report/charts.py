"""The charts of a report: lines over two axes, drawn as SVG in the page's colours, with nothing to load. To add one,
write a function that returns a ``Chart`` and add it to ``charts``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.pruned_config import KEPT, read_kept
from hfprune_dist.config.parameters import KINDS
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.kinds.training import HELD_OUT_KL, LOSSES
from hfprune_dist.planning.plan import NONE, OWN, Cell, Plan, recovery_name
from hfprune_dist.results.formats import count
from hfprune_dist.results.metrics import METRICS, Score, headline
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import other_texts
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import CUTTING, kind_of
from hfprune_dist.structures import LAYERS
from hfprune_dist.structures.layout import kind_of_axis

QUALITY = "quality"  # id of the chart that comes before the table
# Of Okabe and Ito, which can be distinguished with all common kinds of colour blindness, without their yellow and
# black, which vanish on one of the two backgrounds.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
DASHES = ("", "8 4", "2 4", "8 4 2 4", "14 5", "14 5 2 5")
WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 10, 40  # margins, for the axes' labels
MOST_POINTS = 200  # of a line of losses
# x, y, and the standard error of y, if it is known.
Point = tuple[float, float, float | None]


@dataclass(frozen=True)
class Line:
    """One line and its entry in the legend; ``dash`` is SVG's pattern. Points that ``are_marked`` have marks, errors
    and tooltips; a line that ``is_across`` goes from one side to the other at its only y.
    """

    name: str
    color: str
    dash: str
    points: Sequence[Point]
    are_marked: bool = False
    is_across: bool = False


def _short(number: float) -> str:
    return f"{number:.3g}"


@dataclass(frozen=True)
class Panel:
    """One plot; numbers on its axes are formatted by ``x_form`` and ``y_form``."""

    title: str
    x_title: str
    lines: Sequence[Line]
    from_zero: bool = True
    x_form: Callable[[float], str] = _short
    y_form: Callable[[float], str] = _short


@dataclass(frozen=True)
class Chart:
    """A section of the page, with ``id`` as its anchor; ``about`` describes it."""

    id: str
    title: str
    about: str
    panels: Sequence[Panel]


def charts(rows: Sequence[Row], plan: Plan, store: Store) -> list[Chart]:
    """All charts that there is data for, in the order of the page."""
    found = [*_quality(rows), _layers(rows, plan, store), _losses(rows, plan, store)]
    return [chart for chart in found if chart.panels]


def _color(rows: Sequence[Row], method: str | None) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"]))
    return PALETTE[methods.index(method) % len(PALETTE)] if method else GREY


def _of_cell(rows: Sequence[Row], plan: Plan, cell: Cell, points: Sequence[Point]) -> Line:
    """A line in its method's colour and with its ratio's dashes, which repeat."""
    ratios = sorted({0.0, *(ratio for each in plan.cells for ratio in (each.ratio or 0.0, *each.rounds))})
    dash = DASHES[ratios.index(cell.ratio or 0.0) % len(DASHES)]
    return Line(f"{cell.method or 'dense'} {cell.ratio or 0:g}", _color(rows, cell.method), dash, points)


def _finished(plan: Plan, store: Store, *kinds: str) -> Iterator[tuple[Cell, str, Path]]:
    """Yield a row, kind and artifact of each finished stage of these kinds."""
    first = {stage_id: cell for cell in reversed(plan.cells) for stage_id in reversed(cell.producers)}
    for stage_id, cell in reversed(first.items()):
        handle, kind = store.handle(stage_id), plan.stages[stage_id].kind
        if kind in kinds and handle.manifest():
            yield _at_its_round(cell, stage_id), kind, handle.artifact


def _at_its_round(cell: Cell, stage_id: str) -> Cell:
    """A row as it is once it has gone as far as a stage that makes its checkpoint."""
    before = cell.producers[: cell.producers.index(stage_id) + 1]
    cuts = sum(kind_of(made) in CUTTING for made in before)
    if not 0 < cuts <= len(cell.rounds):
        return cell
    *rounds, ratio = cell.rounds[:cuts]
    recovery = recovery_name(cell.recovery.split()[0], rounds)
    return replace(cell, ratio=ratio, recovery=recovery, rounds=tuple(rounds), producers=before)


def _quality(rows: Sequence[Row]) -> list[Chart]:
    """Distance from the dense model and scores of tasks, against size."""
    kl, average, agreement = (METRICS[key] for key in ("kl", "average", "top1_agreement"))
    first = {metric.header: [metric.score(row) for row in rows] for metric in (kl, average)}
    others = {agreement.header: [agreement.score(row) for row in rows]}
    for text in other_texts(rows):
        others[f"KL on {text}"] = [kl.score(row[OTHER_TEXTS].get(text, {})) for row in rows]
    for task in dict.fromkeys(task for row in rows for task in row["tasks"]):
        others[task] = [headline(row["tasks"].get(task, {})) for row in rows]
    about = (
        f"{kl.header}: {kl.told}; {average.header}: {average.told}. Solid lines are with recovery, dotted ones without."
    )
    return [
        Chart(QUALITY, "Quality against size", about, _against_size(rows, first)),
        Chart("tasks", "Tasks and the rest against size", f"agree: {agreement.told}.", _against_size(rows, others)),
    ]


def _against_size(rows: Sequence[Row], measured: Mapping[str, Sequence[Score]]) -> list[Panel]:
    """A panel for each model and measure (title -> that of each row) that pruned rows have, along their parameters."""
    panels = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for title, scores in measured.items():
            lines: dict[tuple[str | None, str], list[Point]] = {}
            for row, (value, error) in zip(rows, scores, strict=True):
                if row["model"] == model and row["parameters"] and value is not None:
                    line = lines.setdefault((row["method"], row["recovery"]), [])
                    line.append((row["parameters"], value, error))
            drawn = [
                Line(
                    (method or "dense") + ("" if recovery in (NONE, OWN) else f" + {recovery}"),
                    _color(rows, method),
                    "2 4" if recovery == NONE else "",
                    sorted(points),
                    are_marked=method is not None,
                    is_across=method is None,
                )
                for (method, recovery), points in lines.items()
            ]
            if any(line.are_marked for line in drawn):
                is_kl = title.startswith(METRICS["kl"].header)
                form = _short if is_kl else lambda share: f"{100 * share:.3g}%"
                panels.append(Panel(f"{model}: {title}", "parameters", drawn, is_kl, count, form))
    return panels


def _layers(rows: Sequence[Row], plan: Plan, store: Store) -> Chart:
    lines: dict[str, list[Line]] = {}
    for cell, *_ in _finished(plan, store, *CUTTING):
        cuts = [store.handle(made).artifact for made in cell.producers if kind_of(made) in CUTTING]
        if not all((cut / KEPT).is_file() for cut in cuts):  # removed to make room
            continue
        *earlier, axes = map(read_kept, cuts)
        numbers = {layer: layer for layer in axes[LAYERS]}
        for before in reversed(earlier):  # each cut numbers the layers that the one before left
            numbers = {layer: before[LAYERS][number] for layer, number in numbers.items()}
        counts: dict[str, dict[int, int]] = {}
        for axis, kept in axes.items():
            if axis.startswith(f"{LAYERS}."):
                layer, kind = kind_of_axis(axis)
                counts.setdefault(kind, {})[numbers[layer]] = len(kept)
        for kind, of_layers in counts.items():
            sides = [(layer, side) for layer in range(1 + max(numbers.values())) for side in (-0.5, 0.5)]
            steps = [(layer + side, of_layers.get(layer, 0), None) for layer, side in sides]
            lines.setdefault(f"{cell.model}: {kind.replace('_', ' ')}", []).append(_of_cell(rows, plan, cell, steps))
    panels = [Panel(title, "layer", drawn) for title, drawn in lines.items()]
    return Chart("layers", "Widths and heads by layer", "How many units of each layer are kept.", panels)


def _losses(rows: Sequence[Row], plan: Plan, store: Store) -> Chart:
    losses: dict[str, list[Line]] = {}
    divergences: dict[str, list[Line]] = {}
    trained = list(dict.fromkeys((row["method"], row["recovery"]) for row in rows))
    for cell, kind, artifact in _finished(plan, store, *(name for name, kind in KINDS.items() if kind.trains)):
        place = trained.index((cell.method, cell.recovery)) if (cell.method, cell.recovery) in trained else 0
        for found, title, x, y in (
            (losses, f"{cell.model}: loss, {kind} {cell.recovery}".replace(f" {OWN}", ""), "step", "loss"),
            (divergences, f"{cell.model}: {METRICS['kl'].header} on the way", "tokens", HELD_OUT_KL),
        ):
            if points := training_losses(artifact / LOSSES, x, y):
                line = _of_cell(rows, plan, cell, [(at, value, None) for at, value in points.items()])
                name = line.name if cell.recovery == OWN else f"{line.name} + {cell.recovery}"
                line = replace(line, name=name, are_marked=x == "tokens" or len(points) == 1)
                found.setdefault(title, []).append(replace(line, color=PALETTE[place % len(PALETTE)]))
    panels = [Panel(title, "step", drawn, from_zero=False, x_form=count) for title, drawn in losses.items()]
    panels += [Panel(title, "tokens", drawn, x_form=count) for title, drawn in divergences.items()]
    about = (
        "Training loss by optimizer step, and divergence from the dense model on held-out text by tokens trained on."
    )
    return Chart("losses", "Training", about, panels)


def training_losses(file: Path, x: str = "step", y: str = "loss") -> Mapping[int, float]:
    """Step -> loss, or others of a line's values, thinned to about ``MOST_POINTS``; none without the file."""
    losses = [(line[x], line[y]) for line in _loss_lines(file) if math.isfinite(line.get(y) or math.nan)]
    stride = -(-len(losses) // MOST_POINTS) or 1
    return dict([*losses[::stride], *losses[-1:]])


def figure(panel: Panel) -> str:
    """HTML of a panel: its title, the plot and a legend."""
    xs = [x for line in panel.lines if not line.is_across for x, _, _ in line.points]
    ys = [y + side * (error or 0) for line in panel.lines for _, y, error in line.points for side in (-1, 1)]
    left, right = _padded(xs)
    low, high = (0.0, _padded(ys)[1]) if panel.from_zero else _padded(ys)

    def place(x: float, y: float) -> tuple[str, str]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f}", f"{HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM):.1f}"

    labels = [(place(tick, low)[0], str(HEIGHT - BOTTOM + 16), panel.x_form(tick)) for tick in ticks(left, right)]
    labels.append((str((LEFT + WIDTH - RIGHT) / 2), str(HEIGHT - 6), panel.x_title))
    parts = [f'<text x="{x}" y="{y}" text-anchor=middle>{text}</text>' for x, y, text in labels]
    for height, text in ((place(left, tick)[1], panel.y_form(tick)) for tick in ticks(low, high)):
        parts.append(f'<path class=grid d="M{LEFT} {height}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height}" dy=".35em" text-anchor=end>{text}</text>')
    keys = []
    for line in panel.lines:
        name, stroke = escape(line.name), f'stroke="{line.color}" stroke-dasharray="{line.dash}"'
        key = f'<path {stroke} d="M0 4H26"/>' if line.is_across or len(line.points) > 1 else ""
        key += f'<circle fill="{line.color}" r=3.5 cx=13 cy=4 />' if line.are_marked else ""
        keys.append(f'<span><svg class=key viewBox="0 0 26 8">{key}</svg>{name}</span>')
        ends = [(end, line.points[0][1]) for end in (left, right)] if line.is_across else line.points
        path = " ".join(",".join(place(x, y)) for x, y, *_ in ends)
        parts.append(f'<polyline {stroke} points="{path}"><title>{name}</title></polyline>')
        for x, y, error in line.points if line.are_marked else ():
            (across, up), told = place(x, y), f"{name}: {panel.x_form(x)}, {panel.y_form(y)}"
            if error is not None:
                told += f"±{panel.y_form(error)}"
                parts.append(
                    f'<path stroke="{line.color}" d="M{across} {place(x, y - error)[1]}V{place(x, y + error)[1]}"/>'
                )
            parts.append(f'<circle fill="{line.color}" r=4 cx="{across}" cy="{up}"><title>{told}</title></circle>')
    title = escape(panel.title)
    plot = f'<svg class=plot viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{title}">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{plot}<div class=legend>{''.join(keys)}</div></figure>"


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with some room at its ends, or around them if they are all the same."""
    room = max(0.06 * (max(values) - min(values)), 0.02 * abs(max(values))) or 1.0
    return min(values) - room, max(values) + room


def ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers between two others."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _loss_lines(file: Path) -> list[dict[str, Any]]:
    """What a training recorded of each step; nothing if the file isn't there (yet), was removed to make room, or is
    damaged.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError):
        return []

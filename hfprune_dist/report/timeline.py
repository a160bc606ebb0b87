"""Timeline of a sweep: when stages ran, in how many attempts, and why attempts failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

from hfprune_dist.report.chart import GREY, PALETTE, Chart, Figure, Key, Trace, shown
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.store.attempt import Attempt
from hfprune_dist.store.stage import STAGE_VERSIONS, Stage

# Idle time is cut out of the chart if it exceeds both this share of the busy time and this number of seconds.
LONG_IDLE_SHARE = 0.1
LONG_IDLE_S = 300.0
# With more stages than this, there is one line per kind of stage instead of one per stage.
MOST_LINES = 60
# Margins on both sides of the time axis, as shares of the time shown.
LEFT_ROOM, RIGHT_ROOM = 0.01, 0.08
# The yellow of the same palette is too pale for lines, but not for bars.
YELLOW = "#F0E442"
COLORS = dict(zip(STAGE_VERSIONS, (*PALETTE, GREY, YELLOW), strict=True))
# Patterns of plotly.js, by state of the attempt.
PATTERNS = {"done": "", "failed": "x", "open": "."}


@dataclass(frozen=True)
class Period:
    """An attempt that has begun, with start and end in unix time; an open one ends, for now, at the report's time."""

    stage: Stage
    attempt: Attempt
    start: float
    end: float


def timeline_chart(evidence: Evidence) -> Chart:
    """The timeline, with a bar for each attempt."""
    periods = sorted(_periods(evidence), key=lambda it: it.start)
    about = "A bar is an attempt at a stage; crossed ones failed, dotted ones have no end yet. Times are UTC."
    keys = [_key(kind) for kind in STAGE_VERSIONS if any(it.stage.kind == kind for it in periods)]
    if not periods:
        return Chart("timeline", "Timeline", about, [], [], "No stage has begun yet.")
    sessions = [*_sessions(periods)]
    about += " Idle time between the dotted lines is left out." if len(sessions) > 1 else ""
    return Chart("timeline", "Timeline", about, [_figure(evidence, periods, sessions)], keys, "")


def _key(kind: str) -> Key:
    return Key(kind, COLORS[kind])


def _periods(evidence: Evidence) -> Iterator[Period]:
    for stage in evidence.plan.stages.values():
        for attempt in evidence.attempts[stage.id]:
            if attempt.started is not None:
                end = evidence.written if attempt.ended is None else attempt.ended
                yield Period(stage, attempt, attempt.started, max(end, attempt.started))


def _sessions(periods: Sequence[Period]) -> Iterator[tuple[float, float]]:
    """Yield (begin, end) of the sessions: spans of time separated by long idle times.

    Args:
        periods: sorted by start; at least one.
    """
    busy: list[list[float]] = []
    for it in periods:
        if busy and it.start <= busy[-1][1]:
            busy[-1][1] = max(busy[-1][1], it.end)
        else:
            busy.append([it.start, it.end])
    limit = max(LONG_IDLE_S, LONG_IDLE_SHARE * sum(end - start for start, end in busy))
    begin = busy[0][0]
    for (_, end), (start, _) in pairwise(busy):
        if start - end > limit:
            yield begin, end
            begin = start
    yield begin, busy[-1][1]


def _figure(evidence: Evidence, periods: Sequence[Period], sessions: Sequence[tuple[float, float]]) -> Figure:
    by_kind = len({it.stage.id for it in periods}) > MOST_LINES
    lines = list(dict.fromkeys(_line(it.stage, by_kind) for it in periods))
    offsets = _offsets(sessions)
    places = [offset for _, offset in offsets]
    groups: dict[str, list[Period]] = {}
    for it in periods:
        groups.setdefault(it.stage.kind, []).append(it)
    traces = [_bars(group, _key(kind), by_kind, offsets) for kind, group in groups.items()]
    marks = [*zip(places, (start for start, _ in sessions), strict=True)]
    marks.append((places[-1] + sessions[-1][1] - sessions[-1][0], sessions[-1][1]))
    cuts = [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x} for x in places[1:]]
    layout = {
        "barmode": "overlay",
        "xaxis": {
            "tickvals": [place for place, _ in marks],
            "ticktext": [_time(moment).replace(" ", "<br>") for _, moment in marks],
            # plotly.js omits the last label if there is no room for it.
            "range": [-LEFT_ROOM * marks[-1][0], (1 + RIGHT_ROOM) * marks[-1][0]],
        },
        "yaxis": {"type": "category", "categoryarray": [*map(shown, lines)], "autorange": "reversed"},
        "shapes": [cut | {"line": {"dash": "dot", "width": 1, "color": GREY}} for cut in cuts],
    }
    return Figure("", "", traces, layout, height=90 + 22 * len(lines))


def _line(stage: Stage, by_kind: bool) -> str:
    return stage.kind if by_kind else f"{stage.kind} {stage.label} {stage.fingerprint[:4]}"


def _offsets(sessions: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(unix time at which it begins, its position on the axis in seconds) of each session."""
    offsets, passed = [], 0.0
    for begin, end in sessions:
        offsets.append((begin, passed))
        passed += end - begin
    return offsets


def _bars(periods: Sequence[Period], key: Key, by_kind: bool, offsets: Sequence[tuple[float, float]]) -> Trace:
    begins = [next(pair for pair in reversed(offsets) if pair[0] <= it.start) for it in periods]
    return {
        "type": "bar",
        "orientation": "h",
        "name": shown(key.name),
        "legendgroup": key.name,
        "y": [shown(_line(it.stage, by_kind)) for it in periods],
        "base": [it.start - begin + place for it, (begin, place) in zip(periods, begins, strict=True)],
        # At least a second, since a shorter bar would be invisible.
        "x": [max(it.end - it.start, 1.0) for it in periods],
        "hovertext": [shown(_told(it)) for it in periods],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": key.color, "pattern": {"shape": [PATTERNS[it.attempt.state] for it in periods]}},
    }


def _told(period: Period) -> str:
    attempt = period.attempt
    said = f"{period.stage.kind} {period.stage.label}, attempt {attempt.number}: {_time(period.start)}, "
    said += f"{period.end - period.start:.0f} s, {attempt.cause or attempt.state}"
    return said + (f", {attempt.where}" if attempt.where else "")


def _time(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M}"

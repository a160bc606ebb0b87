"""The text of a report: progress of the sweep, failures, and provenance of its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from hfprune_dist.report.evidence import Evidence
from hfprune_dist.report.rows_table import link
from hfprune_dist.results.formats import counted
from hfprune_dist.results.notes import MEASURED_OTHERWISE, otherwise_measured
from hfprune_dist.store.artifacts import Manifest
from hfprune_dist.store.attempt import Attempt
from hfprune_dist.store.heartbeat import in_one_line
from hfprune_dist.store.stage import Stage

LONGEST_MESSAGE = 500
# With more stages or rows of a kind than this, the others are counted.
MOST_NAMES = 12


def time_of(moment: float) -> str:
    """Format a unix time for people."""
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def summary(evidence: Evidence) -> str:
    """HTML of the sweep's progress: finished rows and stages, and what is missing."""
    done = sum(row["status"] == "done" for row in evidence.rows)
    made = [manifest for manifest in evidence.manifests.values() if manifest]
    hours = sum(manifest.get("wall_time_s") or 0.0 for manifest in made) / 3600
    lacking = evidence.plan.lacking(lambda stage_id: evidence.manifests[stage_id] is not None)
    stages = f"{len(made)} of {counted(len(made) + len(lacking), 'stage')} made, in {hours:.1f} hours"
    return (
        f"<p><b>{done} of {counted(len(evidence.rows), 'row')}</b> with a result; {stages}.</p>"
        + _open(evidence)
        + _missing(evidence)
        + _otherwise(evidence)
    )


def _open(evidence: Evidence) -> str:
    """Attempts that may be running."""
    told = [
        f"{stage.kind} {stage.label}" + (f" ({attempt.message})" if attempt.message else "")
        for stage in evidence.plan.stages.values()
        for attempt in evidence.attempts[stage.id]
        if attempt.state == "open"
    ]
    return f"<p>Begun, without an end: {_first(told)}.</p>" if told else ""


def _missing(evidence: Evidence) -> str:
    causes: dict[str, list[str]] = {}
    for row in evidence.rows:
        if row["status"] != "done":
            causes.setdefault(row["cause"], []).append(row["label"])
    lines = "".join(f"<li><b>{escape(cause)}</b>: {_first(labels)}</li>" for cause, labels in causes.items())
    return f"<div class=note id=missing><p>Missing, and why:</p><ul>{lines}</ul></div>" if lines else ""


def _otherwise(evidence: Evidence) -> str:
    """Rows that charts and table show beside others with which they can't be compared."""
    labels = otherwise_measured(evidence.rows)
    return f"<p class=note>{MEASURED_OTHERWISE.capitalize()}: {_first(labels)}.</p>" if labels else ""


def _first(names: Sequence[str]) -> str:
    """HTML of the first names, and how many more there are."""
    more = len(names) - MOST_NAMES
    return escape(", ".join(names[:MOST_NAMES])) + (f" and {more} more" if more > 0 else "")


def failures(evidence: Evidence) -> str:
    """HTML table of all attempts that ended without an artifact."""
    lines = [
        _failure(stage, attempt, evidence)
        for stage in evidence.plan.stages.values()
        for attempt in evidence.attempts[stage.id]
        if attempt.state == "failed"
    ]
    if not lines:
        return "<p>No attempt has failed.</p>"
    names = ("stage", "attempt", "ended", "cause", "message", "log")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = f"<table id=failures><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f"<div class=wide>{table}</div>"


def _failure(stage: Stage, attempt: Attempt, evidence: Evidence) -> str:
    ended = "-" if attempt.ended is None else time_of(attempt.ended)
    texts = (
        f"{stage.kind} {stage.label}",
        str(attempt.number),
        ended,
        attempt.cause,
        in_one_line(attempt.message)[:LONGEST_MESSAGE],
    )
    cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
    return f"<tr>{cells}<td>{escape(attempt.where)} {_logs(attempt.logs, evidence)}</td></tr>"


def _logs(logs: Iterable[Path], evidence: Evidence) -> str:
    return " ".join(f'<a href="{link(log, evidence.out)}">{escape(log.name)}</a>' for log in logs)


def provenance(evidence: Evidence) -> str:
    """HTML of what artifacts were made with, and of the configuration of the last run."""
    made = [manifest for manifest in evidence.manifests.values() if manifest]
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{_counted(value(manifest) for manifest in made)}</td></tr>'
        for name, value in (*_ORIGINS.items(), *_packages(made))
    ]
    lines += [f'<tr><th scope="row">{name}</th><td>{escape(said)}</td></tr>' for name, said in _times(made)]
    table = f"<table id=provenance><tbody>{''.join(lines)}</tbody></table>" if made else "<p>No artifact yet.</p>"
    config = f"<details><summary>configuration of the last run</summary><pre>{escape(evidence.config)}</pre></details>"
    return f"<div class=wide>{table}</div>" + (config if evidence.config else "")


def _commit(manifest: Manifest) -> str:
    found = manifest.get("provenance", {})
    commit = found.get("git_commit") or "unknown"
    return commit + (" with changes" if found.get("dirty_diff_sha256") else "")


_ORIGINS = {
    "commit": _commit,
    "seed": lambda manifest: str(manifest.get("config", {}).get("seed", "-")),
    "device": lambda manifest: str(manifest.get("device", "-")),
    "ranks": lambda manifest: str(manifest.get("world_size", "-")),
    "machine": lambda manifest: str(manifest.get("provenance", {}).get("machine", "-")),
    "python": lambda manifest: str(manifest.get("provenance", {}).get("python", "-")),
}


def _packages(made: Iterable[Manifest]) -> Iterator[tuple[str, Any]]:
    versions = [manifest.get("provenance", {}).get("packages", {}) for manifest in made]
    for package in dict.fromkeys(name for found in versions for name in found):
        yield package, lambda manifest, it=package: str(manifest.get("provenance", {}).get("packages", {}).get(it, "-"))


def _counted(values: Iterable[str]) -> str:
    """HTML of the distinct values, with the number of stages for each if there are several values."""
    counts = Counter(values)
    if len(counts) == 1:
        return escape(next(iter(counts)))
    return "<br>".join(
        f"{escape(value)} <small>({counted(number, 'stage')})</small>" for value, number in counts.most_common()
    )


def _times(made: Iterable[Manifest]) -> Iterator[tuple[str, str]]:
    times = [finished for manifest in made if (finished := manifest.get("finished")) is not None]
    if times:
        yield "finished", f"{time_of(min(times))} to {time_of(max(times))}"

"""What more training would give: a law fitted to the KL on held-out text that a training measured on the way.

    KL(D) = E + A D^-b    D: tokens trained on

The form that losses of language models follow (arXiv 2203.15556), for a model of one size. Tokens count by the rate
that they are learnt with, without which the decay of a run's rate would pass for a floor of KL.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfprune_dist.errors import UserError
from hfprune_dist.kinds.training import HELD_OUT_KL, LOSSES, UNTRAINED_KL
from hfprune_dist.results.formats import count, counted, number
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.stage import Stage

Floats = NDArray[np.float64]
# With fewer points than this, neither residuals nor a fit without the last third tell how large errors are.
LEAST_POINTS = 6
# Exponents that are tried, and then factors of the best one.
EXPONENTS, FINER = np.geomspace(0.02, 3.0, 100), np.geomspace(0.95, 1.05, 201)
# Mean of a cosine's rate, as a share of its peak.
MEAN_RATE = 0.5
# How many times the tokens of a run its law is told for, and how many it is trusted for at all.
AHEAD, FARTHEST = 10, 100
SHARES = {"half": 0.5, "90 %": 0.1}  # of what pruning lost: regained -> left
# Settings of a recipe that say how long it goes on, or what is measured meanwhile.
LENGTH = ("tokens", "epochs", "max_steps", "evaluate_every", "patience")


@dataclass(frozen=True)
class Law:
    """KL(D) = floor + factor (D / unit)^-exponent, with the covariance of floor, factor and exponent.

    Attributes:
        drift: by how much a fit without the last third missed the last point: relative error per unit of ln D, or for
            D doubled if it was less.
    """

    floor: float
    factor: float
    exponent: float
    unit: float
    covariance: Floats
    drift: float = 0.0

    @classmethod
    def fitted(cls, points: Mapping[float, float]) -> Law:
        """The fit of least squares in relative errors: tokens -> KL, both above 0; without a drift of few points."""
        tokens, kls = (np.asarray([*values], dtype=np.float64) for values in (points.keys(), points.values()))
        error, floor, factor, exponent = _best(tokens / tokens[-1], kls, EXPONENTS)
        error, floor, factor, exponent = _best(tokens / tokens[-1], kls, exponent * FINER)
        powers = (tokens / tokens[-1]) ** -exponent
        slopes = np.stack([np.full_like(powers, floor > 0), powers, -factor * powers * np.log(tokens / tokens[-1])])
        variance = error / max(1, len(kls) - 3)
        covariance = variance * np.linalg.pinv((slopes / kls) @ (slopes / kls).T, rcond=1e-12)
        law = cls(floor, factor, exponent, float(tokens[-1]), covariance.astype(np.float64))
        if len(points) < LEAST_POINTS:
            return law
        shorter = cls.fitted(dict([*points.items()][: math.ceil(2 / 3 * len(points))]))
        ahead = max(math.log(2), math.log(tokens[-1] / shorter.unit))
        drift = abs(math.log(shorter.at(tokens[-1])[0] / kls[-1])) / ahead
        return cls(floor, factor, exponent, law.unit, law.covariance, drift)

    def at(self, tokens: float) -> tuple[float, float]:
        """KL after so many tokens, and its standard error: the larger of what residuals and ``drift`` come to."""
        ratio = tokens / self.unit
        power = ratio**-self.exponent
        kl = self.floor + self.factor * power
        slopes = np.asarray([self.floor > 0, power, -self.factor * power * math.log(ratio)], dtype=np.float64)
        statistical = math.sqrt(max(0.0, float(slopes @ self.covariance @ slopes)))
        return kl, max(statistical, kl * self.drift * max(0.0, math.log(ratio)))

    def tokens_to(self, kl: float) -> float:
        """Tokens after which KL is that low; infinite if it never is."""
        left = kl - self.floor
        if left <= 0 or self.factor <= 0:
            return math.inf
        return float(self.unit * math.exp(min(700.0, math.log(self.factor / left) / self.exponent)))


def _best(shares: Floats, kls: Floats, exponents: Floats) -> tuple[float, float, float, float]:
    """``_with_exponent`` of the exponent that fits best."""
    return min(_with_exponent(shares, kls, float(exponent)) for exponent in exponents)


def _with_exponent(shares: Floats, kls: Floats, exponent: float) -> tuple[float, float, float, float]:
    """The sum of squared relative errors, and floor, factor and exponent, of the best law with this exponent."""
    basis = np.stack([np.ones_like(kls), shares**-exponent], axis=1) / kls[:, None]
    floor, factor = np.linalg.lstsq(basis, np.ones_like(kls), rcond=None)[0]
    if floor < 0:
        floor, factor = 0.0, basis[:, 1].sum() / (basis[:, 1] @ basis[:, 1])
    errors = basis @ np.asarray([floor, factor]) - 1
    return float(errors @ errors), float(floor), float(factor), exponent


@dataclass(frozen=True)
class Run:
    """What a training measured on the way.

    Attributes:
        points: tokens, as ``_at_mean_rate`` counts them -> KL on held-out text.
        tokens: of the last point, as they are.
        untrained: KL before the first step.
        hours: device-hours of a token; None until the training has ended.
    """

    points: Mapping[float, float]
    tokens: int
    untrained: float
    hours: float | None

    @classmethod
    def read(cls, handle: StageHandle) -> Run | None:
        """That of a stage, which may still be running; None if it measured nothing, or nothing after it had learnt."""
        lines = next(filter(None, (loss_lines(folder / LOSSES) for folder in (handle.artifact, handle.work))), [])
        if not lines or UNTRAINED_KL not in lines[0] or not (points := _at_mean_rate(lines)):
            return None
        made: Mapping[str, Any] = handle.manifest() or {}
        tokens = made.get("metrics", {}).get("training_tokens")
        hours = made["world_size"] * made["wall_time_s"] / 3600 / tokens if tokens else None
        last = max(line.get("tokens", 0) for line in lines)
        return cls(points, last, lines[0][UNTRAINED_KL], hours)

    def outlook(self, tokens: float | None = None) -> str:
        """A sentence on KL after so many tokens, or ``AHEAD`` times as many; and on what regains how much."""
        measured = f"by {counted(len(self.points), 'point')} up to {count(self.tokens)} tokens"
        if len(self.points) < LEAST_POINTS:
            return f"too few points: {measured}; {LEAST_POINTS} give an outlook"
        law, last = Law.fitted(self.points), self.tokens
        asked = AHEAD * last if tokens is None else tokens
        if asked > FARTHEST * last:
            return f"too far ahead: {measured}, of {count(asked)}"
        kl, error = law.at(asked)
        told = f"KL {kl:.3f}±{error:.3f} after {self._price(asked)}"
        if tokens is None:
            ways = (f"{share} {self._until(left * self.untrained, law)}" for share, left in SHARES.items())
            told += f"; of what pruning lost, regained: {', '.join(ways)}"
        return f"{told} ({measured})"

    def _until(self, kl: float, law: Law) -> str:
        """When KL is that low: by the first point that is, or else, by the law, after the last point."""
        if reached := [tokens for tokens, measured in self.points.items() if measured <= kl]:
            return f"by {self._price(reached[0])}"
        needed, most = max(law.unit, law.tokens_to(kl)), FARTHEST * self.tokens
        return f"after {self._price(needed)}" if needed <= most else f"not within {self._price(most)}"

    def _price(self, tokens: float) -> str:
        hours = "" if self.hours is None else f" ({number(tokens * self.hours, '.2g')} device-hours)"
        return f"{count(float(f'{tokens:.2g}'))} tokens{hours}"


def _at_mean_rate(lines: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Tokens -> KL on held-out text, where a law can hold: once there was a rate, and where KL is above 0. Each token
    counts by the rate that it was learnt with, as a multiple of a whole run's mean rate: what the middle of a run has
    learnt takes a whole run more tokens.
    """
    points: dict[float, float] = {}
    rates: list[float] = []
    learnt, before = 0.0, 0
    for line in lines:
        rates.append(line["learning_rate"])
        if HELD_OUT_KL in line:
            learnt += (line["tokens"] - before) * fmean(rates)
            before, rates = line["tokens"], []
            if learnt > 0 and 0 < line[HELD_OUT_KL] < math.inf:
                points[learnt] = line[HELD_OUT_KL]
    mean_rate = MEAN_RATE * max(line["learning_rate"] for line in lines)
    return {learnt / mean_rate: kl for learnt, kl in points.items()}


def loss_lines(file: Path) -> list[dict[str, Any]]:
    """What a training recorded of each step; nothing if the file isn't there (yet), or was removed to make room."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []


def outlook_of_planned(stage: Stage, store: Store) -> str | None:
    """``Run.outlook`` for the tokens of a training that hasn't run, by the longest run of the same recipe on the same
    inputs; None without such a run, or if something else than ``tokens`` says how long it goes on.
    """
    recipe, runs = stage.params.to_json()["recovery"], []
    if not recipe.get("tokens") or recipe.get("max_steps"):
        return None
    for folder in listed(store.root / stage.kind, "[!.]*"):
        handle = store.handle(f"{stage.kind}/{folder.name}")
        made = handle.manifest()
        with suppress(UserError):  # of another version
            alike = made and _whatever_the_length(Stage.from_json(made["stage"])) == _whatever_the_length(stage)
            if alike and (run := Run.read(handle)) is not None:
                runs.append(run)
    return max(runs, key=lambda run: run.tokens).outlook(recipe["tokens"]) if runs else None


def _whatever_the_length(stage: Stage) -> list[Any]:
    """All that a training depends on but for its length."""
    params = stage.params.to_json()
    recipe = {name: value for name, value in params["recovery"].items() if name not in LENGTH}
    return [recipe, params["seed"], {role: source.identity for role, source in stage.inputs.items()}]

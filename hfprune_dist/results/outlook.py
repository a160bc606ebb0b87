"""What more training would give: a law of the KL on held-out text at the ends of shorter trainings by the same recipe.

    KL(D) = E + A D^-b    D: tokens trained on

The form that losses of language models follow (arXiv 2203.15556), for a model of one size. Only ends count: on the way,
KL depends on how far the learning rate has decayed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfprune_dist.config.training import LENGTHS
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.training import HELD_OUT_KL, LOSSES, UNTRAINED_KL, has_converged
from hfprune_dist.results.formats import count, rough
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.stage import Stage

# A law has three unknowns.
LEAST_RUNS = 3
# Exponents that are tried.
EXPONENTS = np.geomspace(0.02, 3.0, 5000)
# How many times the tokens of the longest run a law is told for.
AHEAD = 10
SHARES = {"half": 0.5, "90 %": 0.1}  # of what pruning lost: regained -> left
# Settings of a recipe that say how long it goes on, or what is measured meanwhile.
LENGTH = (*LENGTHS, "evaluate_every", "patience")


@dataclass(frozen=True)
class Law:
    """KL(D) = floor + factor D^-exponent."""

    floor: float
    factor: float
    exponent: float

    @classmethod
    def fitted(cls, points: Mapping[int, float], *, has_floor: bool = True) -> Law:
        """The fit of least squares in relative errors: tokens, in ascending order -> KL, all above 0."""
        tokens, kls = (np.asarray([*values], dtype=np.float64) for values in (points.keys(), points.values()))
        weights = kls**-2 / (kls**-2).sum()
        powers = tokens ** -EXPONENTS[:, None]  # [exponents, points]; for each exponent, KL is a line over them
        mean_power, mean_kl = has_floor * (powers @ weights), has_floor * (kls @ weights)  # else a line through 0
        apart = powers - mean_power[..., None]
        factors = apart @ (weights * (kls - mean_kl)) / (apart**2 @ weights)
        floors = mean_kl - factors * mean_power
        best = ((floors[:, None] + factors[:, None] * powers - kls) ** 2 @ weights).argmin()
        if floors[best] < 0:
            return cls.fitted(points, has_floor=False)
        return cls(float(floors[best]), float(factors[best]), float(EXPONENTS[best]))

    def at(self, tokens: float) -> float:
        """KL after so many tokens."""
        return float(self.floor + self.factor * tokens**-self.exponent)

    def tokens_to(self, kl: float) -> float:
        """Tokens after which KL is that low; infinite if it never is."""
        left = kl - self.floor
        if left <= 0 or self.factor <= 0:
            return math.inf
        return math.exp(min(700.0, math.log(self.factor / left) / self.exponent))


def foretold(points: Mapping[int, float], tokens: float) -> tuple[float, float]:
    """KL after so many tokens, more than any point's, by ``Law.fitted`` of at least ``LEAST_RUNS`` points; and its
    error: the difference from a law without a floor or, if larger, the relative error of the shorter runs' law at the
    longest run, times how much farther this one looks ahead (in logarithms of tokens).
    """
    law, plain = Law.fitted(points), Law.fitted(points, has_floor=False)
    *shorter, longest = points
    before = Law.fitted({each: points[each] for each in shorter}, has_floor=len(shorter) >= LEAST_RUNS)
    missed = abs(math.log(before.at(longest) / points[longest])) / math.log(longest / shorter[-1])
    kl = law.at(tokens)
    return kl, max(abs(plain.at(tokens) - kl), kl * missed * math.log(tokens / longest))


@dataclass(frozen=True)
class Run:
    """A training that has ended: its tokens, KL on held-out text at its end and before it, device-hours of a token."""

    tokens: int
    kl: float
    untrained: float
    hours: float


# Digest of all that a training depends on but for its length -> its runs, the shortest first.
Runs = Mapping[str, Sequence[Run]]


def read_runs(store: Store) -> Runs:
    """Trainings of a store that measured KL on held-out text, and didn't end early, before their rate had decayed."""
    runs: dict[str, list[Run]] = {}
    for folder in listed(store.root / "recover", "[!.]*"):
        handle = store.handle(f"recover/{folder.name}")
        made, lines = handle.manifest(), loss_lines(handle.artifact / LOSSES)
        if not (made and lines and UNTRAINED_KL in lines[0] and 0 < lines[-1].get(HELD_OUT_KL, 0) < math.inf):
            continue
        with suppress(UserError):  # of another version
            stage, last = Stage.from_json(made["stage"]), lines[-1]
            if not has_converged(lines, stage.params.to_json()["recovery"].get("patience")):
                hours = made["world_size"] * made["wall_time_s"] / 3600 / made["metrics"]["training_tokens"]
                run = Run(last["tokens"], last[HELD_OUT_KL], lines[0][UNTRAINED_KL], hours)
                runs.setdefault(_recipe_of(stage), []).append(run)
    return {recipe: sorted(found, key=lambda run: run.tokens) for recipe, found in runs.items()}


def outlook(stage: Stage, runs: Runs, tokens: float | None = None) -> str | None:
    """A sentence on KL after so many tokens of a training, or ``AHEAD`` times as many as its longest run's; and then on
    what regains how much. None if runs have fewer than ``LEAST_RUNS`` lengths, if one of them is as long already, or if
    that is farther than a law of them is trusted for.
    """
    found = runs.get(_recipe_of(stage), [])
    points = {run.tokens: run.kl for run in found}
    if len(points) < LEAST_RUNS:
        return None
    longest, law = found[-1], Law.fitted(points)
    asked = AHEAD * longest.tokens if tokens is None else tokens
    if not longest.tokens < asked <= _farthest(found):
        return None
    measured = f"by {len(points)} runs of {count(found[0].tokens)} to {count(longest.tokens)} tokens"
    kl, error = foretold(points, asked)
    told = f"KL {kl:.3f}±{error:.3f} after {_price(asked, longest)}"
    if tokens is None:
        ways = (f"{share} {_until(left * longest.untrained, law, found)}" for share, left in SHARES.items())
        told += f"; of what pruning lost, regained: {', '.join(ways)}"
    return f"{told} ({measured})"


def _until(kl: float, law: Law, runs: Sequence[Run]) -> str:
    """When KL is that low: by the law, or by a run that got there, whatever the law says."""
    reached = (run.tokens for run in runs if run.kl <= kl)
    needed = min([max(law.tokens_to(kl), runs[0].tokens), *reached])
    most, longest = _farthest(runs), runs[-1]
    return f"after {_price(needed, longest)}" if needed <= most else f"not within {_price(most, longest)}"


def _farthest(runs: Sequence[Run]) -> float:
    """The most tokens a law is trusted for: 100 times the longest run's, fewer if lengths differ less than tenfold."""
    return runs[-1].tokens * min(10.0, runs[-1].tokens / runs[0].tokens) ** 2


def _price(tokens: float, longest: Run) -> str:
    return f"{rough(tokens)} tokens ({rough(tokens * longest.hours)} device-hours)"


def _recipe_of(stage: Stage) -> str:
    """Digest of all that a training depends on but for its length."""
    params = stage.params.to_json()
    recipe = {name: value for name, value in params["recovery"].items() if name not in LENGTH}
    return digest_of([recipe, params["seed"], {role: source.identity for role, source in stage.inputs.items()}])


def loss_lines(file: Path) -> list[dict[str, Any]]:
    """What a training recorded of each step; nothing if the file isn't there (yet), was removed to make room, or is
    damaged.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, ValueError):
        return []

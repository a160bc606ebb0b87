"""What rows measure: one table from which columns, notes, comparisons, charts, the report's page and cards are made.

And the headline of each task, the one of its scores that tables show. Needs neither torch nor lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hfprune_dist.results.formats import byte_count, count, duration, number, percent, rough, with_error

Row = Mapping[str, Any]
# A value, and its standard error; None if it isn't known.
Score = tuple[float | None, float | None]


@dataclass(frozen=True)
class Metric:
    """A number in rows.

    Attributes:
        key: its key in rows and column in results.csv; ``<key>_stderr`` is that of its standard error, if it has one.
        header: of its column in tables for people.
        meaning: what it is, for below a table; empty if the header says it.
        form: formats a value.
        better: which direction is better, if one is.
        brief: what is said of it below a table of a few columns; None: such a table doesn't have it.
    """

    key: str
    header: str
    meaning: str
    form: Callable[[float | None], str]
    better: Literal["", "lower", "higher"] = ""
    brief: str | None = None

    @property
    def told(self) -> str:
        """The meaning, and which direction is better."""
        return self.meaning + (f", {self.better} is better" if self.better else "")

    def score(self, row: Row) -> Score:
        """The value, and its standard error; None if it isn't known."""
        return row.get(self.key), row.get(f"{self.key}_stderr")

    def shown(self, row: Row) -> str:
        """The value, and its standard error if it has one."""
        return with_error(*self.score(row), self.form)

    def is_known(self, rows: Sequence[Row]) -> bool:
        """Whether any row has a value."""
        return any(row.get(self.key) is not None for row in rows)


def _form(form: str) -> Callable[[float | None], str]:
    return partial(number, form=form)


_KL = "mean divergence of the next token's distribution from the dense model's, nats per token"
_SPEED = "tokens per second after the first, relative to the dense model's, measured in turn"
_OWN = "of a row's own stages"
METRICS = {
    metric.key: metric
    for metric in (
        Metric("ratio_reached", "reached", "removed / all parameters", _form("z.4f")),
        Metric("parameters", "params", "", count),
        Metric("share_kept", "kept%", "parameters in % of the dense model's", percent, brief=""),
        Metric("kl", "KL", _KL, _form("z.3f"), "lower", "from the dense model, in nats per token, lower is better"),
        Metric("top1_agreement", "agree", "share of tokens with the dense model's top token", _form("z.3f"), "higher"),
        Metric("perplexity", "ppl", "perplexity per token", _form("z.2f"), "lower"),
        Metric("average", "avg", "mean of the tasks' scores in %", percent, "higher", "mean of the tasks' scores in %"),
        Metric("weight_bytes", "size", "of the weights on disk", byte_count, brief=""),
        Metric("decode_speed", "speed", _SPEED, _form("z.2f"), "higher", "of decoding, dense = 1"),
        Metric("decode_tokens_per_s", "tokens/s", "of all sequences together", count, "higher"),
        Metric("time_to_first_token_s", "first token", "from the prompts to it, in seconds", _form(".3g"), "lower"),
        Metric("generation_memory_bytes", "generating", "most memory at once, weights included", byte_count),
        Metric("flops_per_token", "FLOPs/token", "computed from shapes", count),
        Metric("cache_bytes_per_token", "cache/token", "keys and values of one token", byte_count),
        Metric("training_tokens", "tokens", "of the rows that recovery trains on, padding included", count),
        Metric("training_flops", "FLOPs", "of these, computed from shapes", count),
        Metric("device_hours", "device-h", "of making a row's checkpoint, time x ranks, in hours", rough),
        Metric("own_time_s", "time", _OWN, duration, brief=_OWN),
        Metric("wall_time_s", "total", "of all stages behind a row, those that it shares included", duration),
        Metric("peak_memory_bytes", "memory", "the most that one rank took", byte_count),
    )
}
# Those of the comparison with the dense model on one text.
OF_TEXT = ("kl", "top1_agreement", "perplexity")

# A task's headline is the first of these that it reports: shares of right answers, or scores that the paper averages
# with those. Perplexities can't be: a task that reports nothing else has no headline.
HEADLINES = ("acc_norm", "acc", "accuracy", "prompt_level_strict_acc", "pct_stereotype", "exact_match", "em", "f1")


def headline_metric(scores: Mapping[str, Any]) -> str | None:
    """Name of the score that stands for a task; None if there is no suitable one. lm-eval's filters are part of names,
    as in ``exact_match[strict-match]``, and the strictest one counts.
    """
    for metric in HEADLINES:
        names = [name for name in scores if name.partition("[")[0] == metric and not name.endswith("_stderr")]
        if names:
            return min(names, key=lambda name: ("[" in name, "strict" not in name, name))
    return None


def headline(scores: Mapping[str, Any]) -> Score:
    """The score that stands for a task, with its standard error."""
    name = headline_metric(scores)
    if name is None or scores[name] is None:
        return None, None
    scale = 100 if "HasAns_f1" in scores else 1  # lm-eval's squadv2 reports percent
    error = scores.get(f"{name}_stderr")
    return scores[name] / scale, None if error is None else error / scale


def average(tasks: Mapping[str, Mapping[str, Any]]) -> Score:
    """Mean headline over all tasks, and its standard error if they are independent; None if a task's is missing.

    A task that reports only other scores, such as perplexities, is left out: it has no headline that could be missing.
    """
    found = [headline(scores) for scores in tasks.values() if not scores or headline_metric(scores)]
    values = [value for value, _ in found if value is not None]
    errors = [error for _, error in found if error is not None]
    if not found or len(values) < len(found):
        return None, None
    return sum(values) / len(values), math.hypot(*errors) / len(errors) if len(errors) == len(found) else None

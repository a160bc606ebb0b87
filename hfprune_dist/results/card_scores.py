"""The scores of a model card: as entries of the hub's ``model-index``, and as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfprune_dist.config.texts import FIRST, OTHER_TEXTS
from hfprune_dist.results.card_subject import Subject, text_of
from hfprune_dist.results.formats import counted
from hfprune_dist.results.markdown import escaped, table

if TYPE_CHECKING:  # takes a while to import; commands should answer at once
    from huggingface_hub import EvalResult

TASK_TYPE, TASK_NAME = "text-generation", "Text Generation"
STDERR = "_stderr"
# Metric of a comparison -> its title for people, and which direction is better.
_COMPARED = {
    "kl": "KL divergence from the dense model per token, nats (lower is better)",
    "top1_agreement": "agreement with the dense model on the most likely next token (higher is better)",
    "perplexity": "perplexity per token (lower is better)",
}


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        place: type (or id), config, split and revision of the data set, as far as it has them; identifies it.
        dataset: the data set, described for people in Markdown.
        metric: identifier of the metric.
        title: the metric, described for people.
        error: standard error, None if it isn't known.
        dense: the dense model's value; None if it was not measured in the same way.
    """

    place: Mapping[str, str]
    dataset: str
    metric: str
    title: str
    value: float
    error: float | None
    dense: float | None


def scores_of(subject: Subject) -> list[Score]:
    """All known scores of a checkpoint's evaluation, fidelity first."""
    return [*_fidelity(subject), *_tasks(subject)]


def _fidelity(subject: Subject) -> Iterator[Score]:
    dense_texts = {FIRST: subject.dense_scores.get("fidelity", {}), **subject.dense_scores.get(OTHER_TEXTS, {})}
    for name, reference, metrics in subject.held_out_texts():
        settings = reference.params.to_json().get("text") or {}
        source = reference.inputs.get("text")
        described = (
            f"held-out text, {counted(settings.get('windows'), 'window')} of {settings.get('sequence_length')} tokens "
            f"of {text_of(settings, source)}"
        )
        place = _on_hub(settings) if source is None else {"type": "held-out", "config": name}
        for metric, title in _COMPARED.items():
            if (value := metrics.get(metric)) is not None:
                yield Score(
                    place,
                    described,
                    metric,
                    title,
                    value,
                    metrics.get(metric + STDERR),
                    dense_texts.get(name, {}).get(metric),
                )


def _on_hub(settings: Mapping[str, Any]) -> dict[str, str]:
    """Where to find a text on the hub."""
    keys = {"dataset": "type", "name": "config", "split": "split", "revision": "revision"}
    return {ours: settings[key] for key, ours in keys.items() if settings.get(key)}


def _tasks(subject: Subject) -> Iterator[Score]:
    dense_tasks = subject.dense_scores.get("tasks", {})
    settings = subject.evaluation.params.to_json()
    shots, limit = settings.get("num_fewshot"), settings.get("limit")
    how = f"lm-eval{'' if shots is None else f', {shots}-shot'}"
    how += "" if limit is None else f", at most {counted(limit, 'document')} a task"
    for task, metrics in subject.scores.get("tasks", {}).items():
        dense: Mapping[str, Any] = dense_tasks.get(task, {})
        for metric, value in metrics.items():
            if value is not None and not metric.endswith(STDERR):
                yield Score(
                    {"type": task},
                    f"{escaped(task)} ({how})",
                    metric,
                    metric,
                    value,
                    metrics.get(metric + STDERR),
                    dense.get(metric),
                )


def eval_results(scores: list[Score]) -> list[EvalResult]:
    """Convert scores to the hub's format, in which a standard error is a metric of its own, ``<metric>_stderr``."""
    from huggingface_hub import EvalResult

    def result(score: Score, metric: str, title: str, value: float) -> EvalResult:
        return EvalResult(
            task_type=TASK_TYPE,
            task_name=TASK_NAME,
            dataset_name=score.dataset,
            dataset_type=score.place["type"],
            dataset_config=score.place.get("config") or None,
            dataset_split=score.place.get("split"),
            dataset_revision=score.place.get("revision"),
            metric_type=metric,
            metric_name=title,
            metric_value=value,
        )

    listed = []
    for score in scores:
        listed.append(result(score, score.metric, score.title, score.value))
        if score.error is not None:
            listed.append(result(score, score.metric + STDERR, f"standard error of {score.metric}", score.error))
    return listed


def scores_table(scores: list[Score]) -> str:
    """Markdown table of the scores, with a column for the dense model if it was measured in the same way."""
    with_dense = any(score.dense is not None for score in scores)
    lines = []
    for number, score in enumerate(scores):
        again = number > 0 and scores[number - 1].dataset == score.dataset
        error = "" if score.error is None else f" ± {score.error:.2g}"
        dense = "-" if score.dense is None else f"{score.dense:.5g}"
        told = ["" if again else score.dataset, escaped(score.title)]
        lines.append([*told, f"{score.value:.5g}{error}", *[dense] * with_dense])
    return table(["on", "metric", "value", *["dense"] * with_dense], lines)

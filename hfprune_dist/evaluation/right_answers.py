"""Places of the right answers among the choices of lm-eval's tasks, which give the score of a constant answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

# Key in an evaluation's results: task -> number of documents with their right answer in each place.
RIGHT_ANSWERS = "right_answers"


def right_answers(tasks: Mapping[str, Any], limit: int | None) -> dict[str, list[int]]:
    """Task -> number of evaluated documents with their right answer in each place.

    Tasks that aren't multiple-choice, accept several answers, or score with code of their own have no entry.

    Args:
        tasks: name -> lm-eval's task.
        limit: maximum number of documents per task.
    """
    found = {name: _places(task, limit) for name, task in tasks.items() if _has_one_right_choice(task)}
    return {name: [places[place] for place in range(max(places) + 1)] for name, places in found.items() if places}


def _has_one_right_choice(task: Any) -> bool:
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask) or type(task).process_results is not ConfigurableTask.process_results:
        return False
    chooses = task.OUTPUT_TYPE == "multiple_choice" and not callable(task.config.process_results)
    return chooses and not task.multiple_target


def _places(task: Any, limit: int | None) -> Counter[int]:
    """Place -> number of documents; empty if one has no right answer among its choices (lm-eval counts it as wrong)."""
    places = Counter(_place(task, document) for _, document in task.doc_iterator(limit=limit))
    return Counter() if None in places else Counter({place: n for place, n in places.items() if place is not None})


def _place(task: Any, document: Any) -> int | None:
    """Place of the right answer, as lm-eval's own scoring finds it; with several questions, that of the right one."""
    choices = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None

"""Where the right answers of lm-eval's tasks are among the choices, from which follows what a constant answer gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

# In an evaluation's results: task -> how many documents have their right answer in each place.
RIGHT_ANSWERS = "right_answers"


def right_answers(tasks: Mapping[str, Any], limit: int | None) -> dict[str, list[int]]:
    """Of the documents that are evaluated, how many have their right answer in each place.

    Tasks that choose among no answers, accept several, or score by code of their own have no entry.

    Args:
        tasks: name -> lm-eval's task.
        limit: documents of each task at most.
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
    """Place -> documents; none where one has no right answer among its choices, which lm-eval counts as wrong."""
    places = Counter(_place(task, document) for _, document in task.doc_iterator(limit=limit))
    return Counter() if None in places else Counter({place: n for place, n in places.items() if place is not None})


def _place(task: Any, document: Any) -> int | None:
    """As lm-eval's own scoring finds it; where texts of the question are compared, their number is the answer."""
    choices = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    if isinstance(gold, str):
        return choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None

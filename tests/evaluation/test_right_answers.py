"""Positions of right answers, compared with lm-eval's scores of constant answers."""

import json

import pytest
import yaml

from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader
from hfprune_dist.evaluation.right_answers import right_answers

ANSWERS = [0, 2, 1, 1, 1, 0, 1]
KINDS = {
    "by_number": {"doc_to_target": "{{label}}", "doc_to_choice": "{{choices}}", "doc_to_text": "{{text}}"},
    "by_name": {"doc_to_target": "{{choices[label]}}", "doc_to_choice": "{{choices}}", "doc_to_text": "{{text}}"},
    "by_field": {"doc_to_target": "label", "doc_to_choice": "choices", "doc_to_text": "text"},
}
OTHERS = {
    "several": {"doc_to_target": "{{[0, 1]}}", "doc_to_choice": "{{choices}}", "doc_to_text": "{{text}}"},
    "generates": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "exact_match"}],
    },
    "own_scoring": {**KINDS["by_number"], "process_results": "!function own.scores"},
}


@pytest.fixture
def load(tmp_path):
    """Return a function that writes a task over documents with these answers, and loads it."""

    def loaded(settings):
        documents = [{"text": "a b", "choices": ["x", "y", "z"], "label": label} for label in ANSWERS]
        (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(it) + "\n" for it in documents))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "tiny.jsonl"}}}
        choice = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
        task = {"task": "tiny", **source, "test_split": "test", **choice, **settings}
        text = yaml.safe_dump(task).replace("'!function own.scores'", "!function own.scores")
        (tmp_path / "tiny.yaml").write_text(text)
        (tmp_path / "own.py").write_text("def scores(document, results):\n    return {'acc': 1.0}\n")
        return TaskLoader(["tiny"], tmp_path, tmp_path / "cache").load("tiny", 0)["tasks"]

    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_is_as_often_right_as_lm_eval_says(load, kind):
    tasks = load(KINDS[kind])
    (task,) = tasks.values()
    for limit in (None, 4):
        (counts,) = right_answers(tasks, limit).values()
        assert sum(counts) == len(ANSWERS[:limit])
        for place, count in enumerate(counts):
            results = [(float(choice == place), False) for choice in range(3)]
            scored = [task.process_results(document, results)["acc"] for _, document in task.doc_iterator(limit=limit)]
            assert sum(scored) == count


@pytest.mark.parametrize("kind", OTHERS)
def test_tasks_that_have_no_one_right_choice_have_no_places(load, kind):
    assert right_answers(load(OTHERS[kind]), None) == {}


def test_a_right_answer_that_is_no_choice_is_in_no_place(load):
    assert right_answers(load({**KINDS["by_number"], "doc_to_target": "{{label + 2}}"}), None) == {}

"""Which tasks let the model write its answer, told by their YAML files alone."""

import pytest

from hfprune_dist.evaluation.task_definitions import generating_tasks

OWN = {
    "writes": "task: writes\n",
    "says": "task: says\noutput_type: generate_until\n",
    "chooses": "task: chooses\noutput_type: multiple_choice\ntag: [mixed]\n",
    "inherits": "task: inherits\ninclude: base.yml\n",
    "class": "task: class\nclass: !function code.Task\n",
    "orphan": "task: orphan\ninclude: missing.yml\n",
    "group": "group: group\ntask: [chooses, inner]\n",
    "inner": "group: inner\ntask: [says]\n",
    "quiet": "group: quiet\ntask: [chooses, quiet]\n",
}


@pytest.fixture
def own(tmp_path):
    for name, text in OWN.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "base.yml").write_text("output_type: loglikelihood\n")
    return tmp_path


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        *(("writes", True), ("says", True), ("chooses", False), ("inherits", False), ("class", False)),
        *(("orphan", False), ("group", True), ("inner", True), ("quiet", False), ("mixed", False)),
    ],
)
def test_what_the_users_tasks_do(own, task, expected):
    assert generating_tasks([task], own) == [task] * expected


def test_what_lm_evals_tasks_do():
    """Through files that are included, too."""
    asked = ["gsm8k", "arc_easy", "triviaqa", "nq_open", "wikitext", "hellaswag", "bbh_cot_fewshot", "mmlu", "no_such"]
    assert generating_tasks(asked, None) == ["gsm8k", "triviaqa", "nq_open", "bbh_cot_fewshot"]

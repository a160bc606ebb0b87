"""Tasks in which the model writes its answer, recognized by their YAML files alone."""

import json
from types import SimpleNamespace

import pytest
import yaml
from lm_eval.models.utils import normalize_gen_kwargs

from hfprune_dist.errors import UserError
from hfprune_dist.evaluation import lm_eval_tasks
from hfprune_dist.evaluation.lm_eval_tasks import TaskLoader, check_tasks
from hfprune_dist.evaluation.task_definitions import (
    generating_tasks,
    own_definitions,
    require_room_for_answers,
    shipped_definitions,
)

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


@pytest.mark.parametrize("included", ["5", "true", "{base: yml}"])
def test_an_include_that_names_no_files_is_refused(own, included):
    """In a task to evaluate; without an effect on what is told of the others."""
    (own / "odd.yaml").write_text(f"task: odd\ninclude: {included}\n")
    assert generating_tasks(["odd", "says"], own) == ["says"]
    with pytest.raises(UserError, match=r"odd\.yaml: include must be the name of a file, or a list of names, not "):
        check_tasks(["odd"], own)


def test_a_file_with_a_tag_that_is_not_a_name_is_left_out(own):
    """As by lm-eval; other tasks are evaluated."""
    (own / "odd.yaml").write_text("task: odd\ntag: 5\n")
    found, unreadable = own_definitions(own)
    assert "says" in found and "odd" not in found
    assert unreadable == {own / "odd.yaml": "tag must be a name, or a list of names, not 5"}
    check_tasks(["says"], own)


def test_what_lm_evals_tasks_do():
    """Also through included files."""
    asked = ["gsm8k", "arc_easy", "triviaqa", "nq_open", "wikitext", "hellaswag", "bbh_cot_fewshot", "mmlu", "no_such"]
    assert generating_tasks(asked, None) == ["gsm8k", "triviaqa", "nq_open", "bbh_cot_fewshot"]


# Groups, by whether lm-eval keeps the names of all tasks in them.
KEPT = {
    "plain": "[a, b]",
    "each": "[{task: a, num_fewshot: 0}, {task: b, num_fewshot: 0}]",
    "each_below": "[{task: each, num_fewshot: 0}, c]",
    "as_group": "[{group: plain, num_fewshot: 0}, c]",
    "inline": "[plain, {group: sub, task: [c]}]",
}
LOST = {
    "with_settings": ("[{task: plain, num_fewshot: 0}, c]", "all tasks of plain one name", "plain, c"),
    "tagged": ("[{task: tag, num_fewshot: 0}]", "all tasks of tag one name", "tag"),
    "inside": ("[{group: other, task: [{task: plain}]}, {task: tag}]", "of plain and of tag one name", "plain, tag"),
    "below": ("[a, with_settings]", "in group 'with_settings'", "plain, c"),
}


@pytest.fixture
def groups(tmp_path):
    task = (
        "tag: tag\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.json}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: l\n"
    )
    (tmp_path / "data.json").write_text(json.dumps({"q": "x", "c": ["y", "z"], "l": 0}))
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{task}")
    for name, members in (KEPT | {name: members for name, (members, _, _) in LOST.items()}).items():
        (tmp_path / f"group_{name}.yaml").write_text(f"group: {name}\ntask: {members}\n")
    return tmp_path


def test_only_groups_in_which_tasks_lose_their_names_are_refused(groups):
    for name in KEPT:
        check_tasks([name], groups)
    for name, (_, reason, instead) in LOST.items():
        with pytest.raises(UserError, match=f"{reason}.*: {instead}$"):
            check_tasks([name], groups)


def test_lm_eval_still_takes_names_away_where_a_group_is_refused(groups, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval_tasks, "_folders_of", lambda *_: [])  # none of its own 14,000 files has the tag
    loader = TaskLoader([*KEPT, *LOST], groups, tmp_path / "cache")
    for name in (*KEPT, *LOST):
        assert (set(loader.load(name, 0)["tasks"]) <= {"a", "b", "c"}) == (name in KEPT), name


HOLLOW = {
    "no list": ("task: a", "'g' .*g.yaml.* has no members"),
    "an empty list": ("task: []", "has no members"),
    "no key": ("aggregate_metric_list: [{metric: acc}]", "has no members"),
    "itself": ("task: [a, g]", "'g' .* is a member of itself"),
    "itself with settings": ("task: [a, {task: g, num_fewshot: 1}]", "'g' .* is a member of itself"),
    "itself in another": ("task: [a, other]", "'g' .* is a member of itself"),
    "an unknown name": ("task: [a, bb, c]", r"unknown task 'bb' \(listed in .*g.yaml\); did you mean"),
    "an unknown name inside": ("task: [{group: inline, task: [a, nowhere]}]", r"unknown task 'nowhere' \(listed in"),
}


@pytest.mark.parametrize("what", HOLLOW)
@pytest.mark.parametrize("asked", ["g", "around"])
def test_groups_that_lm_eval_cannot_unfold_are_refused_before_it_tries(groups, monkeypatch, what, asked):
    monkeypatch.setattr(lm_eval_tasks, "_open_index", lambda *_: SimpleNamespace(task_index={}))
    members, message = HOLLOW[what]
    (groups / "g.yaml").write_text(f"group: g\n{members}\n")
    (groups / "other.yaml").write_text("group: other\ntask: [b, g]\n")
    (groups / "around.yaml").write_text("group: around\ntask: [c, g]\n")
    with pytest.raises(UserError, match=message):
        check_tasks([asked], groups)


def test_a_group_may_define_a_member_by_its_settings(groups):
    task = "{task: new, dataset_path: json, dataset_kwargs: {data_files: {test: data.json}}, test_split: test}"
    (groups / "g.yaml").write_text(f"group: g\ntask: [a, {task}]\n")
    check_tasks(["g"], groups)


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        *((f"{{{key}: 40}}", 40) for key in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")),
        ("{max_tokens: 7, max_gen_toks: null, max_new_tokens: 30, until: [x]}", 30),
        *(("{until: [x]}", 256), ("{}", 256), ("null", 256)),
    ],
)
def test_an_answer_as_long_as_all_that_a_model_reads_is_refused(tmp_path, options, tokens):
    assert normalize_gen_kwargs(yaml.safe_load(options) or {})["max_gen_toks"] == tokens, "as lm-eval counts"
    (tmp_path / "long.yaml").write_text(f"task: long\ndataset_path: x\ngeneration_kwargs: {options}\n")
    (tmp_path / "choice.yaml").write_text("task: choice\noutput_type: multiple_choice\n")
    (tmp_path / "odd.yaml").write_text("task: odd\ngeneration_kwargs: {max_gen_toks: many}\n")
    require_room_for_answers(["odd", "choice", "long"], tmp_path, tokens + 1, tmp_path)
    for positions in (tokens, tokens - 1):
        with pytest.raises(UserError, match=f"'long' .* may have {tokens} tokens .* reads {positions}, prompt incl"):
            require_room_for_answers(["odd", "choice", "long"], tmp_path, positions, tmp_path)


def test_lm_evals_own_files_are_searched_once():
    assert shipped_definitions() is shipped_definitions()

"""How long recovery trains, and what its recipes leave to the section."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfprune_dist.config.load import load_config
from hfprune_dist.config.training import Training
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.errors import UserError


@given(hundredths=st.integers(1, 1000), steps_per_epoch=st.integers(1, 10_000))
@example(110, 10)
def test_epochs_are_as_many_as_are_written(hundredths, steps_per_epoch):
    """In binary, 1.1 epochs of 10 steps are a little more than 11 steps."""
    expected = ceil(Fraction(hundredths, 100) * steps_per_epoch)
    assert Training(epochs=hundredths / 100, batch_size=1).steps(steps_per_epoch, steps_per_epoch, 8) == expected
    assert Training(epochs=hundredths / 100, max_steps=5).steps(steps_per_epoch, steps_per_epoch, 8) == 5


@pytest.mark.parametrize(("written", "tokens"), [("300k", 300_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), (7, 7)])
def test_counts_of_tokens_are_read_as_they_are_written(written, tokens):
    assert Training(tokens=written).tokens == tokens


@given(tokens=st.integers(1, 10**6), rows=st.integers(1, 300), batch_size=st.integers(1, 200))
@example(15, 3, 2)
def test_a_budget_of_tokens_is_as_many_steps_as_it_takes(tokens, rows, batch_size):
    """Of three rows in steps of two, the first step has one row."""
    schedule = Schedule(rows, batch_size, 0)
    steps = Training(tokens=tokens, batch_size=batch_size).steps(rows, schedule.steps_per_epoch, 10)
    few, enough = (10 * schedule.rows_before(steps - less) for less in (1, 0))
    assert few < tokens <= enough
    assert schedule.rows_before(2) == len(schedule.rows_of(0)) + len(schedule.rows_of(1))


def trainings_of(**settings):
    return load_config([], {f"recovery.{name}": value for name, value in settings.items()}).recovery.trainings()


def test_defaults_follow_from_what_is_trained_and_what_is_learnt():
    recipes = {"a": {"objective": "distill"}, "b": {"method": "full", "batch_size": 8}, "c": {"method": "parts"}}
    found = trainings_of(recipes=recipes)
    settings = {name: (each.learning_rate, each.batch_size, each.weight_decay) for name, each in found.items()}
    assert settings == {"a": (1e-3, 16, 0.0), "b": (1e-4, 8, 0.05), "c": (1e-4, 128, 0.05)}
    assert list(trainings_of(answers="dense", samples=9, objective="distill")) == ["lora-answers-distill"]
    assert list(trainings_of(objective=0.5)) == ["lora-mixed"] and list(trainings_of(method="none")) == ["none"]


def test_recipes_read_back_as_they_were_and_take_their_own_texts_alone(tmp_path):
    recipes = {"small": {}, "large": {"rank": 32, "dataset": "a/b", "text": "documents", "tokens": "1M"}}
    config = load_config([], {"recovery.path": "/x.jsonl", "recovery.rank": 8, "recovery.recipes": recipes})
    (tmp_path / "written.yaml").write_text(to_yaml(config.model_dump()))
    for read in (config, load_config([tmp_path / "written.yaml"], {})):
        small, large = read.recovery.trainings().values()
        assert (small.rank, small.path, large.rank, large.path, large.dataset) == (8, "/x.jsonl", 32, None, "a/b")


def test_patience_that_recipes_share_is_for_those_that_evaluate():
    found = trainings_of(patience=2, recipes={"a": {"evaluate_every": "1k"}, "b": {}})
    assert (found["a"].patience, found["b"].patience) == (2, None)


def test_a_recipes_own_length_takes_the_place_of_the_sections():
    lengths = {"epochs": {"epochs": 3.0}, "tokens": {"tokens": "1k"}, "steps": {"max_steps": 7}}
    found = trainings_of(max_steps=4, tokens="2k", recipes=lengths | {"same": {}})
    steps = {name: training.steps(rows=12_800, per_epoch=100, sequence_length=10) for name, training in found.items()}
    assert steps == {"epochs": 300, "tokens": 1, "steps": 7, "same": 4}


def test_fields_that_are_not_read_may_have_any_names():
    asked = {"instruction_field": "response", "answers": "dense", "samples": 9}
    assert trainings_of(**asked)["lora-answers"].instruction_field == "response"
    found = trainings_of(response_field="output", recipes={"a": {"instruction_field": "response"}})["a"]
    assert (found.instruction_field, found.response_field) == ("response", "output")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"recipes": {"a": {"text": "documents", "dataset": "b/c"}}}, "recipes.a: documents of a data set have no end"),
        ({"text": "documents", "dataset": "a/b"}, "recovery: documents of a data set have no end: set tokens"),
        ({"text": "documents", "tokens": "1M"}, "recovery: documents need a path or a dataset; MBZUAI"),
        ({"recipes": {"a": {"patience": 2}}}, "recipes.a: patience counts evaluations on the way: set evaluate_every"),
        ({"patience": 2}, "recovery: patience counts evaluations on the way: set evaluate_every"),
        ({"patience": 2, "recipes": {"a": {}}}, "recipes.a: patience counts evaluations on the way"),
        ({"recipes": {"a": {"method": "none"}, "b": {"method": "none"}}}, "recipes.b: another recipe has method none"),
        ({"recipes": {"none": {}}}, "choose another name"),
        ({"recipes": {"a": {"response_field": "instruction"}}}, "recipes.a: instruction_field and response_field are"),
        ({"recipes": {"via": {}}}, "recipes.via: in tables this word means something else; choose another name"),
        ({"recipes": {"a": {"objektive": "labels"}}}, "unknown key 'recovery.recipes.a.objektive'"),
        (
            {"text": "calibration", "answers": "dense"},
            "recovery: answers dense: text calibration has no instructions; set",
        ),
        (
            {"answers": "dense", "recipes": {"a": {"text": "documents", "path": "/b"}}},
            "recipes.a: answers dense: text documents has",
        ),
        (
            {"answers": "dense", "max_steps": 1},
            "answers all records of a data set, however few are trained on: set sam",
        ),
        ({"tokens": "3 million"}, "recovery.tokens"),
        ({"parts": ["first_3_layers"]}, "recovery.parts.0"),
        ({"objective": 1.5}, "recovery.objective"),
    ],
)
def test_recipes_that_say_nothing_sensible(settings, told):
    with pytest.raises(UserError) as error:
        trainings_of(**settings)
    assert told in str(error.value)

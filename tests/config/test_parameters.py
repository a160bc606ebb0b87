"""Parameters with which stages are planned, recorded and run: typed settings whose records never change by mistake."""

import contextlib
import json
import random
from typing import Annotated, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning.recording import Drawing, draw
from pydantic import BaseModel

from hfprune_dist.config.left_out import LeftOutAt, left_out
from hfprune_dist.config.parameters import PARAMETERS, PruneParameters, read_parameters
from hfprune_dist.config.recorded import OtherParameters
from hfprune_dist.config.section import Section
from hfprune_dist.config.texts import CalibrationConfig
from hfprune_dist.errors import UserError
from hfprune_dist.store.stage import STAGE_VERSIONS, Stage

CUT = {"ratio": 0.2, "criterion": "entropy", "allocation": "uniform", "refit": "none", "multiple_of": 1}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Stages of drawn configurations, by id."""
    drawing, generator = Drawing(tmp_path_factory.mktemp("drawing")), random.Random(0)
    stages = {}
    for _ in range(30):
        with contextlib.suppress(UserError):
            stages |= drawing.plan(*draw(generator)).stages
    return stages


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Stages of a configuration that also measures speed, and of a method that prunes in recovery."""
    settings = {"ratios": [0.1], "calibration.path": "calibration.jsonl", "evaluation.fidelity.path": "held-out.jsonl"}
    settings |= {"efficiency": {"enabled": True, "prompt_tokens": [3], "new_tokens": 2}, "evaluation.tasks": []}
    own = {"distilled": {"criterion": "entropy", "distill": 1}, "own": {"prunes_in": "recovery", "allocation": "local"}}
    return Drawing(tmp_path_factory.mktemp("measured")).plan(settings, own).stages


def sections_of(kind):
    """Yield a class of settings and the classes of its parts."""
    yield kind
    for field in kind.model_fields.values():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections_of(part)


def through_json(stage):
    return json.loads(json.dumps(stage.to_json()))


def test_there_is_a_class_for_every_kind_of_stage():
    assert PARAMETERS.keys() == STAGE_VERSIONS.keys()


def test_what_is_recorded_is_read_as_what_was_planned(planned, measured):
    stages = planned | measured
    assert {stage.kind for stage in stages.values()} == PARAMETERS.keys()
    for stage in stages.values():
        for read in (Stage.from_json(through_json(stage)), Stage.to_run(through_json(stage))):
            assert type(read.params) is type(stage.params) is PARAMETERS[stage.kind]
            assert read == stage and hash(read.params) == hash(stage.params)
            assert read.to_json() == stage.to_json() and read.id == stage.id
            assert read.params.compute_dtype == stage.params.compute_dtype


def test_no_path_and_of_a_file_no_data_set_is_recorded(planned):
    text = json.dumps([stage.params.to_json() for stage in planned.values()])
    assert '"path"' not in text and '"include_path"' not in text
    for stage in planned.values():
        if stage.kind == "importance":
            assert ("dataset" in stage.params.to_json()["calibration"]) is ("calibration" not in stage.inputs)


@settings(derandomize=True, deadline=None)
@given(data=st.data())
def test_a_record_of_another_version_keeps_its_name_and_is_not_run(planned, data):
    """With the same version number, but one key more or less, or an integer in place of a float, at any depth."""
    record = through_json(data.draw(st.sampled_from(sorted(planned.values(), key=lambda stage: stage.id))))
    holders = [record["params"], *(value for value in record["params"].values() if isinstance(value, dict))]
    holder = data.draw(st.sampled_from(holders))
    whole = [key for key, value in holder.items() if isinstance(value, float) and value == int(value)]
    change = data.draw(st.sampled_from(["more", "less", *(["integer"] if whole else [])]))
    key = data.draw(st.sampled_from(whole if change == "integer" else sorted(holder)))
    if change == "more":
        holder["unknown"] = 1
    elif change == "integer":
        holder[key] = int(holder[key])
    else:
        del holder[key]
    changed = Stage(record["kind"], record["label"], record["params"])
    again = through_json(changed)
    assert again["params"] == record["params"], "recorded as it was read"
    read = Stage.from_json(again)
    assert read.id == changed.id
    if change == "less" and type(read.params) is not OtherParameters:
        assert key in left_out(read.params), "as if it had been planned without"
        return
    assert type(read.params) is OtherParameters
    with pytest.raises(
        UserError, match=rf"{changed.id} was planned by another version of the code; run sweep\.py again"
    ):
        Stage.to_run(again)


def test_a_setting_that_came_later_is_left_out_where_it_changes_nothing():
    class Later(Section):
        text: str
        unit: Annotated[str, LeftOutAt("neurons")] = "neurons"

    class Stages(PruneParameters):
        unit: Annotated[str, LeftOutAt("neurons")] = "neurons"
        part: Later | None = None

    before, of_a_part = PruneParameters(**CUT).to_json(), Later(text="a")
    assert Stages(**CUT).to_json() == before | {"part": None}
    assert Stages(**CUT, unit="layers", part=of_a_part).to_json() == before | {"unit": "layers", "part": {"text": "a"}}
    assert left_out(of_a_part) == {"unit"}


def test_what_may_be_left_out_is_the_default():
    """So a record from before the setting existed is read with its meaning unchanged."""
    for kind in PARAMETERS.values():
        for section in sections_of(kind):
            for name, field in section.model_fields.items():
                for mark in field.metadata:
                    assert not isinstance(mark, LeftOutAt) or mark.value == field.default, (section, name)


def test_settings_are_equal_where_they_are_recorded_alike():
    assert PruneParameters(**CUT) == PruneParameters(**CUT) != PruneParameters(**CUT | {"ratio": 0.3})
    assert read_parameters("prune", CUT | {"later": 1}) != PruneParameters(**CUT)
    assert read_parameters("prune", CUT | {"ratio": 1}) != read_parameters("prune", CUT | {"ratio": 1.0})


def test_settings_can_not_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        PruneParameters(**CUT).ratio = 0.3


@pytest.mark.parametrize("ratio", [1, True, "0.2"])
def test_fingerprints_tell_what_json_tells(ratio):
    assert read_parameters("prune", {**CUT, "ratio": ratio}).to_json() == {**CUT, "ratio": ratio}
    assert json.dumps(Stage("prune", "", {**CUT, "ratio": ratio}).to_json()["params"]["ratio"]) == json.dumps(ratio)


def test_a_section_of_the_configuration_is_recorded_without_its_place():
    record = {"calibration": {}, "criteria": ["entropy"], "dtype": "float32", "add_bos_token": True, "seed": 0}
    local = CalibrationConfig(path="/a/text.jsonl", dataset=None)
    params = PARAMETERS["importance"](**record | {"calibration": local})
    assert params.to_json()["calibration"] == {
        "text_field": "text",
        "samples": 1024,
        "sequence_length": 1024,
        "micro_batch_size": 1,
        "shard_size": 4,
    }
    hub = PARAMETERS["importance"](**record | {"calibration": CalibrationConfig()}).to_json()["calibration"]
    assert hub["revision"] is None and hub["dataset"] == "allenai/c4" and "path" not in hub

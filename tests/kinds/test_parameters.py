"""Parameters with which stages are planned, recorded and run."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import yaml
from made_stages import SETTINGS
from sweeps import make_inputs, planned

from hfprune_dist.config.parameters import KINDS, parameters_of
from hfprune_dist.config.texts import CalibrationConfig
from hfprune_dist.errors import UserError
from hfprune_dist.store.stage import Stage


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Stages of all kinds."""
    folder = tmp_path_factory.mktemp("inputs")
    file = make_inputs(folder)
    own = folder / "own.yaml"
    own.write_text(yaml.safe_dump({"prunes_in": "recovery", "allocation": "local"}))
    mixture = [{"path": str(folder / "calibration.jsonl")}, {"path": str(folder / "heldout.jsonl")}]
    of_texts = {"calibration__path": None, "calibration__mixture": mixture}
    recipes = {"lora": {}, "answers": {"answers": "dense"}, "both": {"text": "calibration", "objective": 0.5}}
    settings = {"efficiency__enabled": True, "engines": ["vllm"], "recovery__recipes": recipes}
    methods = ["hfprune", str(own)]
    plans = [planned(file, methods=methods, **settings, **texts)[1] for texts in ({}, of_texts)]
    return [stage for plan in plans for stage in plan.stages.values()]


def through_json(stage):
    return json.loads(json.dumps(stage.to_json()))


def test_what_is_recorded_is_read_as_what_was_planned(stages):
    assert {stage.kind for stage in stages} == KINDS.keys()
    for stage in stages:
        read = Stage.from_json(through_json(stage))
        assert type(read.params) is parameters_of(stage.kind)
        assert read.to_json() == stage.to_json() and read.id == stage.id


def test_another_minor_release_of_a_library_is_another_result(stages):
    for stage in stages:
        assert stage.releases["transformers"].count(".") == 1, "patch releases share results"
        assert {"recover": "peft", "evaluate": "lm-eval"}.get(stage.kind, "torch") in stage.releases
        assert replace(stage, releases={**stage.releases, "transformers": "4.0"}).id != stage.id


def test_no_place_of_a_file_is_recorded(stages, tmp_path_factory):
    assert str(tmp_path_factory.getbasetemp()) not in json.dumps([stage.params.to_json() for stage in stages])


@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_a_record_of_another_version_is_one_message(stages, change):
    for stage in stages:
        record = through_json(stage)
        if change == "less":
            fields = parameters_of(stage.kind).model_fields
            del record["params"][next(name for name, field in fields.items() if field.is_required())]
        else:
            record["params"] |= {"unknown": 1} if change == "more" else {max(record["params"]): {"a": 1}}
        read = Stage.recorded(record)
        assert (read.id, read.to_json()) == (stage.id, record), "it can be shown, and its job cancelled"
        with pytest.raises(UserError, match=rf"{stage.id} was planned by another version of the code; run sweep\.py"):
            Stage.from_json(record)


def test_of_a_file_no_data_set_is_recorded():
    record = {"criteria": ["entropy"], "dtype": "float32", "add_bos_token": True, "seed": 0}
    texts = CalibrationConfig(path="/a/text.jsonl"), CalibrationConfig(path="/b.jsonl", dataset=None, split="test")
    local, other = (parameters_of("importance")(**record, calibration=text).to_json()["calibration"] for text in texts)
    assert local == other and "dataset" not in local
    hub = parameters_of("importance")(**record, calibration=CalibrationConfig()).to_json()["calibration"]
    assert hub["revision"] is None and hub["dataset"] == "allenai/c4" and hub["path"] is None


def test_what_is_added_and_left_as_it_was_changes_no_fingerprint():
    class Later(parameters_of("reference")):
        ADDED: ClassVar = {"more": 0}
        more: int = 0

    before = parameters_of("reference")(**SETTINGS["reference"])
    assert Later(**before.model_dump()).to_json() == before.to_json()
    assert Later(**before.model_dump(), more=1).to_json() == before.to_json() | {"more": 1}

"""The API for notebooks. That a session continues a sweep is tested in test_sweep.py."""

import shutil

import numpy as np
import pytest
from hfprune_launch import api
from hfprune_launch import run as sweep_run
from hfprune_launch.api import Session
from hfprune_launch.sweep_folder import configuration
from made_stages import FakeBackend, failed

from hfprune_dist.errors import UserError


def settings_of(session):
    request = session._request
    return configuration(request.out, request.files, request.overrides)[0]


class Failing(FakeBackend):
    """A backend on which every stage fails."""

    cause = "code"

    def run(self, stage, _):
        return failed(self.store, stage, self.cause, f"{stage.kind} of {stage.label} broke")


@pytest.mark.parametrize(("cause", "error"), [("code", RuntimeError), ("input", UserError)])
def test_a_stage_that_fails_is_an_exception(config, tmp_path, monkeypatch, cause, error):
    monkeypatch.setattr(sweep_run, "LocalBackend", Failing)
    monkeypatch.setattr(Failing, "cause", cause)
    session = Session(tmp_path / "out", config, models=["alpha"], ratios=[0.2])
    for ask in (session.score, session.prune):
        with pytest.raises(error, match="importance failed: importance of alpha broke"):
            ask()
    (dense, *_) = session.compare()
    assert dense["status"] == "failed" and "broke" in dense["cause"]


def test_scores_are_those_of_dense_models_and_of_no_student(config, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(api, "make", lambda prepared: made.extend(prepared.todo))
    monkeypatch.setattr(api, "read_scores", lambda _artifact: {})
    session = Session(tmp_path / "out", config, models=["alpha"], ratios=[0.2], methods=["hfprune", "sdmprune"])
    assert session.score() == {"alpha": {}} and len(made) == 1


def test_numbers_may_be_those_of_numpy(config, tmp_path):
    settings = {"calibration": {"samples": np.int64(3), "add_bos_token": np.bool_(True)}, "seed": np.array(5)}
    for ratios in (np.array([0.2, 0.3]), [np.float64(0.2), np.float64(0.3)]):
        made = settings_of(Session(tmp_path / "out", config, ratios=ratios, **settings))
        assert made.ratios == [0.2, 0.3] and (made.calibration.samples, made.seed) == (3, 5)
        assert made.calibration.add_bos_token is True


def test_a_session_stays_where_it_was_made(config, tmp_path, monkeypatch):
    """A notebook may go to another folder between two calls."""
    first = tmp_path / "first"
    shutil.copytree(config.parent, first)
    monkeypatch.chdir(first)
    settings = {
        "models": ["./mine", "alpha"],
        "calibration": {"path": "calibration.jsonl"},
        "evaluation": {"fidelity": {"path": "text/../heldout.jsonl"}},
    }
    session = Session("out", config.name, **settings)
    monkeypatch.chdir(tmp_path)
    made = settings_of(session)
    assert session._request.out == first / "out"
    assert made.models == [str(first / "mine"), "alpha"], "the second one is an alias"
    assert made.calibration.path == str(first / "calibration.jsonl")
    assert made.evaluation.fidelity.path == str(first / "heldout.jsonl")


def test_bad_input_is_a_user_error_and_nothing_is_written(config, tmp_path):
    session = Session(tmp_path / "out", config, ratio=[0.2])
    for ask in (session.score, session.prune, session.compare):
        with pytest.raises(UserError, match="unknown key 'ratio'; did you mean 'ratios'"):
            ask()
    assert not (tmp_path / "out").exists()

"""Remarks about settings that are allowed but mislead."""

from pathlib import Path

import pytest

from hfprune_dist.config.load import load_config
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.remarks import remarks_on_settings

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "methods"


@pytest.mark.parametrize(
    ("methods", "settings", "idle"),
    [
        (["hfprune"], {"floor": 0.1, "multiple_of": 8}, ["floor: hfprune"]),
        (["surgeon-any-shape"], {"floor": 0.1}, []),
        (["hfprune", "surgeon-plain"], {"tensor_parallel": 3}, ["tensor_parallel: hfprune"]),
        (
            ["hfprune", "wanda-sp"],
            {"floor": 0.1, "protect_first": 1},
            ["floor: hfprune, wanda-sp", "protect_first: hfprune"],
        ),
    ],
)
def test_a_setting_that_a_method_takes_no_notice_of_is_told(methods, settings, idle):
    config = load_config([], {"methods": methods, **{f"prune.{name}": value for name, value in settings.items()}})
    told = remarks_on_settings(config, resolve_methods(config, SHIPPED))
    assert told == [f"prune.{it.replace(': ', ' changes nothing with ')}" for it in idle]


def remarks(settings):
    """Return what is told of a sweep with these settings."""
    config = load_config([], settings)
    return remarks_on_settings(config, resolve_methods(config, SHIPPED))


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"calibration.path": "/a.jsonl", "evaluation.fidelity.path": "/x/../a.jsonl"}, [("", "")]),
        ({"calibration.path": "/a.jsonl", "evaluation.fidelity.path": "/b.jsonl"}, []),
        ({"calibration.path": "/texts", "evaluation.fidelity.path": "/texts/a.jsonl"}, [("", "")]),
        ({"calibration.path": "/texts/a.jsonl", "evaluation.fidelity.path": "/texts"}, [("", "")]),
        ({"calibration.path": "/texts", "evaluation.fidelity.path": "/texts/more/a.jsonl"}, []),
        ({"evaluation.fidelity.split": "train"}, [("", "")]),
        ({"evaluation.fidelity.split": "train", "calibration.name": "de"}, []),
        ({"calibration.path": "/a.jsonl", "evaluation.fidelity.split": "train"}, []),
        (
            {
                "calibration.mixture": [{"path": "/a.jsonl"}, {"path": "/b.jsonl"}],
                "evaluation.fidelity.texts": {"own": {"path": "/b.jsonl"}, "news": {"path": "/c.jsonl"}},
            },
            [(".texts.own", ".mixture.1")],
        ),
        ({"methods": ["loraprune"], "evaluation.fidelity.split": "train"}, []),
    ],
)
def test_a_comparison_on_text_that_models_are_pruned_on_is_told(settings, same):
    told = [f"evaluation.fidelity{one} and calibration{other} read the same text" for one, other in same]
    assert [it.partition(":")[0] for it in remarks(settings)] == told


@pytest.mark.parametrize("name", ["demo", "sweeps/fidelity", "sweeps/own-model", "sweeps/paper", "sweeps/rivals"])
def test_nothing_is_to_be_told_of_shipped_sweeps(name):
    config = load_config([SHIPPED.parent / f"{name}.yaml"], {})
    assert not remarks_on_settings(config, resolve_methods(config, SHIPPED))

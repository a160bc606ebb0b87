"""Remarks about settings that are allowed but do less than they say."""

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
        (["surgeon"], {"floor": 0.1}, []),
        (["hfprune", "surgeon-plain"], {"tensor_parallel": 3}, ["tensor_parallel: hfprune"]),
        (
            ["hfprune", "wanda-sp"],
            {"floor": 0.1, "protect_first": 1},
            ["floor: hfprune, wanda-sp", "protect_first: hfprune"],
        ),
        (
            ["sdmprune", "flap"],
            {"tensor_parallel": 2, "student_lacks": 0.1},
            ["tensor_parallel: sdmprune", "student_lacks: flap"],
        ),
    ],
)
def test_a_setting_that_a_method_takes_no_notice_of_is_told(methods, settings, idle):
    config = load_config([], {"methods": methods, **{f"prune.{name}": value for name, value in settings.items()}})
    told = remarks_on_settings(config, resolve_methods(config, SHIPPED))
    assert told == [f"prune.{it.replace(': ', ' changes nothing with ')}" for it in idle]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_steps": 4, "warmup_steps": 4}, ["max_steps is 4 and warmup_steps 4", "comes to 75% of learning_rate"]),
        ({"max_steps": 1, "warmup_steps": 2}, ["max_steps is 1 and warmup_steps 2", "comes to 0% of learning_rate"]),
        ({"max_steps": 4, "warmup_steps": 3}, []),
        ({"max_steps": 4, "warmup_steps": 4, "method": "none"}, []),
        ({"warmup_steps": 10**6}, []),
    ],
)
def test_a_recovery_that_is_all_warm_up_is_told(settings, told):
    config = load_config([], {f"recovery.{name}": value for name, value in settings.items()})
    remarks = remarks_on_settings(config, resolve_methods(config, SHIPPED))
    assert len(remarks) == bool(told) and all(part in " ".join(remarks) for part in told)

"""Remarks about texts that mislead."""

from pathlib import Path

import pytest

from hfprune_dist.config.load import load_config
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.remarks import remarks_on_texts

SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "methods"


def remarks(settings):
    """Return what is told of a sweep with these settings."""
    config = load_config([], settings)
    return remarks_on_texts(config, resolve_methods(config, SHIPPED))


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"calibration.path": "/a.jsonl", "evaluation.fidelity.path": "/x/../a.jsonl"}, [("", "")]),
        ({"calibration.path": "/texts", "evaluation.fidelity.path": "/texts/a.jsonl"}, [("", "")]),
        ({"evaluation.fidelity.split": "train"}, [("", "")]),
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
    assert [remark.partition(":")[0] for remark in remarks(settings)] == told

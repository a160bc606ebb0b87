"""What an architecture rules out is refused with the plan, by name."""

import pytest
from families import save_model

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.known_shapes import dense_shape
from hfprune_dist.planning.ratios import check_ratios

PLAIN = {"criterion": "entropy", "multiple_of": 1}


@pytest.mark.parametrize(
    ("model_type", "settings", "why"),
    [
        (
            "olmo2",
            {"allocation": "local", "structures": ["neurons", "kv_groups"]},
            "KV groups of olmo2 can't be pruned",
        ),
        ("phi3", {"allocation": "plain", "structures": ["neurons", "kv_groups"]}, "KV groups of phi3 can't be pruned"),
        ("cohere2", {"refit": "layerwise"}, "refit: layerwise isn't possible with cohere2"),
        ("cohere2", {"refit": "block"}, "use dense or none"),
    ],
)
def test_what_an_architecture_rules_out_is_named(tmp_path, model_type, settings, why):
    checkpoint = open_checkpoint(save_model(tmp_path / "m", model_type))
    with pytest.raises(UserError, match=why):
        check_ratios(checkpoint, [0.1], Method(**PLAIN | settings), "m by it")
    possible = {"structures": ["neurons", "layers"], "allocation": "searched", "refit": "dense"}
    for settings in ({}, {"allocation": "global"}, possible):
        check_ratios(checkpoint, [0.1], Method(**PLAIN | settings), "m by it")


def test_heads_that_stay_are_shown(tmp_path):
    heads = dense_shape(open_checkpoint(save_model(tmp_path / "m", "olmo2"))).kv_heads
    assert (heads.least, heads.most) == (2, 2)

"""Which models of a user's are measured, and on how many tokens."""

import json

import pytest
from hfprune_launch.benchmark.settings import require_measurable, tokens_of
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError


@pytest.mark.parametrize(("positions", "tokens"), [(512, 512), (4096, 1024)])
def test_windows_are_no_longer_than_the_models_positions(tmp_path, positions, tokens):
    model = save_tiny(tmp_path, max_position_embeddings=positions)
    assert tokens_of(open_checkpoint(model)) == tokens


def test_layers_of_sizes_of_their_own_are_not_measured(tmp_path):
    config = save_tiny(tmp_path) / "config.json"
    require_measurable(open_checkpoint(tmp_path))
    config.write_text(json.dumps({**json.loads(config.read_text()), "layer_sizes": {"intermediate_size": [48, 48]}}))
    with pytest.raises(UserError, match="give the model that it came from"):
        require_measurable(open_checkpoint(tmp_path))

"""kept.json reads back as it was written."""

from hypothesis import given, settings
from masking import kept_of

from hfprune_dist.checkpoints.kept_file import read_kept, write_kept

MODEL = {"num_hidden_layers": 4, "intermediate_size": 6, "num_key_value_heads": 4}


def plain(kept):
    return kept.layers, {kind: [row.tolist() for row in rows] for kind, rows in kept.units.items()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(kept=kept_of(MODEL, uniform=False))
def test_what_is_written_is_read_back(tmp_path_factory, kept):
    folder = tmp_path_factory.mktemp("kept")
    write_kept(folder, kept)
    assert plain(read_kept(folder)) == plain(kept)

"""kept.json reads back as it was written, by this version or an earlier one."""

import json

import pytest
import torch
from hypothesis import given, settings
from masking import kept_of

from hfprune_dist.checkpoints.kept_file import digest_of_kept, read_kept, write_kept
from hfprune_dist.errors import UserError
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.structures.kept import Kept

MODEL = {"num_hidden_layers": 4, "intermediate_size": 6, "num_key_value_heads": 4}


def plain(kept):
    return kept.layers, {kind: [row.tolist() for row in rows] for kind, rows in kept.units.items()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(kept=kept_of(MODEL, uniform=False), other=kept_of(MODEL, uniform=False))
def test_what_is_written_is_read_back(tmp_path_factory, kept, other):
    folder = tmp_path_factory.mktemp("kept")
    write_kept(folder, kept)
    assert plain(read_kept(folder)) == plain(kept)
    assert json.loads((folder / "kept.json").read_text())["format"] == 2
    assert (digest_of_kept(kept) == digest_of_kept(other)) == (plain(kept) == plain(other))


def test_a_file_of_an_earlier_version_has_the_neurons_of_all_layers(tmp_path):
    rows = [[0, 2], [1, 3, 4]]
    (tmp_path / "kept.json").write_text(json.dumps({"layers": rows}))
    assert plain(read_kept(tmp_path)) == ((0, 1), {"neurons": rows})


def test_a_file_of_a_later_version_is_refused(tmp_path):
    (tmp_path / "kept.json").write_text(json.dumps({"format": 3, "layers": [0], "neurons": [[0]]}))
    with pytest.raises(UserError, match=r"kept\.json: has format 3, which a later version wrote"):
        read_kept(tmp_path)


def test_neurons_alone_have_the_digest_that_earlier_versions_told():
    rows = [[0, 2], [1, 3, 4]]
    kept = Kept.of_all_layers({"neurons": [torch.tensor(row) for row in rows]})
    assert digest_of_kept(kept) == digest_of(rows)
    assert digest_of_kept(Kept((0, 2), kept.units)) != digest_of(rows)

"""Weights read from a checkpoint's files, which are opened once, and rounded to their dtypes."""

from collections import Counter

import pytest
import torch
from tiny import save_tiny

from hfprune_dist.checkpoints import read_tensors
from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored, open_weights, read_tensor
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LayerReader


class Watched:
    """A file with weights that counts how often it is opened, and knows whether it is open."""

    def __init__(self, file, counts):
        self._file, self._counts = file, counts

    def __enter__(self):
        self._counts["opened"] += 1
        return self._file.__enter__()

    def __exit__(self, *error):
        self._counts["closed"] += 1
        return self._file.__exit__(*error)


@pytest.fixture
def watched(monkeypatch):
    """Map the name of each file to how often it was opened and closed."""
    counts, real = {}, read_tensors.safe_open

    def safe_open(file, **options):
        return Watched(real(file, **options), counts.setdefault(file.name, Counter()))

    monkeypatch.setattr(read_tensors, "safe_open", safe_open)
    return counts


@pytest.fixture
def checkpoint(tmp_path):
    """Return one whose layers lie in several files each."""
    return open_checkpoint(save_tiny(tmp_path, shard_size="20KB", num_hidden_layers=3))


def files_of(checkpoint, layer):
    return Counter(info.file for name, info in checkpoint.tensors.items() if f".layers.{layer}." in name)


def test_a_layer_opens_each_of_its_files_once_and_no_others(checkpoint, watched):
    reader = LayerReader(checkpoint, torch.float32, torch.device("cpu"))
    reader.layer(0)  # which reads what all layers share
    for layer in (1, 2):
        tensors = files_of(checkpoint, layer)
        assert 1 < len(tensors) < len({it.file for it in checkpoint.tensors.values()})
        assert max(tensors.values()) > 1, "several tensors of the layer share a file"
        watched.clear()
        reader.weights(layer, lambda tensor, dtype: tensor.to(dtype))
        assert watched == {file: {"opened": 1, "closed": 1} for file in tensors}


def test_files_are_open_while_they_may_be_read_and_no_longer(checkpoint, watched):
    (first, *_, last) = checkpoint.tensors
    with open_weights(checkpoint) as read:
        assert watched == {}, "a file is opened when a tensor in it is asked for"
        once, again = read(first), read(first)
        assert watched == {checkpoint.tensors[first].file: {"opened": 1}}
        read(last)
    assert torch.equal(once, again) and torch.equal(once, read_tensor(checkpoint, first))
    assert all(counts["opened"] == counts["closed"] for counts in watched.values())


def test_what_float16_cannot_hold_is_told_and_nothing_else(tmp_path):
    """65,520 is the smallest number that float16 rounds to infinity."""
    name = "model.layers.1.mlp.down_proj.weight"
    half = open_checkpoint(save_tiny(tmp_path / "half", dtype=torch.float16))
    whole = open_checkpoint(save_tiny(tmp_path / "whole"))
    for value in (float("inf"), float("nan"), 65519.0, 0.1):
        found = as_stored(half, name, torch.tensor([value], dtype=torch.float64), otherwise="")
        torch.testing.assert_close(found, torch.tensor([value]).half(), rtol=0, atol=0, equal_nan=True)
    for sign in (1, -1):
        with pytest.raises(UserError, match=rf"the new {name} has values up to 65,520, but float16, .* or do without"):
            as_stored(half, name, torch.tensor([1.0, sign * 65520.0, float("inf")]), otherwise="do without")
    assert as_stored(whole, name, torch.tensor([1e30]), otherwise="").isfinite().all()
    assert as_stored(half, "new.bias", torch.ones(3), like=name, otherwise="").dtype == torch.float16

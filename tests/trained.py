"""What a stage that trains has written."""

import json

import torch
from safetensors.torch import load_file

from hfprune_dist.checkpoints.checkpoint import open_checkpoint


def lines_of(store, stage):
    """Return the lines of ``loss.jsonl``, one for each step."""
    return [json.loads(line) for line in (store.handle(stage.id).artifact / "loss.jsonl").read_text().splitlines()]


def losses_of(store, stage, key="loss"):
    return [line[key] for line in lines_of(store, stage)]


def weights_of(folder):
    """Return the weights of a checkpoint, by name."""
    files = open_checkpoint(folder).weight_files
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def assert_same_weights(folder, other):
    found, expected = weights_of(folder), weights_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name

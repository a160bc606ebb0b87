"""The demo's models in engines: what the table says loads computes what transformers does, and nothing else does."""

import functools
import shutil

import pytest
import torch
from engine_marks import is_there, python_of
from hfprune_launch import prune
from masking import write
from safetensors.torch import load_file, save_file

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.engines import ENGINES, fit
from hfprune_dist.engines.check import check
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.structures.kept import Kept

LAYERS = 30
ALL, FEWER = range(LAYERS), [layer for layer in range(LAYERS) if not 14 <= layer <= 23]
WIDTHS = [1536 - 24 * (layer % 5) - (100 if layer > 15 else 0) for layer in ALL]
GROUPS = [2 if layer in (9, 17, 23) else 3 for layer in ALL]
# Name -> model, layers that stay, neurons and KV groups that each keeps.
BY_MAGNITUDE = {
    "llama-fewer-layers": ("llama", FEWER, [1472] * 20, None),
    "qwen-fewer-layers": ("qwen", FEWER, [1472] * 20, None),
    "llama-fewer-groups": ("llama", ALL, [1472] * 30, [2] * 30),
    "qwen-fewer-groups": ("qwen", ALL, [1472] * 30, [2] * 30),
    "mistral-7-heads": ("llama-9-groups", ALL, [1472] * 30, [7] * 30),
    "any-widths": ("llama", ALL, WIDTHS, None),
    "any-heads": ("llama", ALL, WIDTHS, GROUPS),
    "qwen-any-heads": ("qwen", ALL, WIDTHS, GROUPS),
}
PRUNED = {"llama-plain-0.2": ("llama", 0.2), "qwen-plain-0.5": ("qwen", 0.5)}
QUICK = {"calibration.samples": 4, "calibration.sequence_length": 128, "efficiency.enabled": False, "runtime.ranks": 1}


@pytest.fixture(scope="session")
def made(real_assets, tmp_path_factory):
    """A function: name -> its checkpoint, which is made when it is first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make(name):
        if name in PRUNED:
            model, ratio = PRUNED[name]
            text = real_assets / "text" / "calibration.jsonl"
            settings = {**QUICK, "prune.effort": "quick", "importance.dtype": "float32", "evaluation.dtype": "float32"}
            return prune.prune(real_assets / model, root / name, ratio, text=text, settings=settings)
        model, layers, widths, groups = BY_MAGNITUDE[name]
        source = real_assets / model if model != "llama-9-groups" else _with_a_group_for_each_head(real_assets, root)
        dense, tensors = open_checkpoint(source), {}
        for file in source.glob("*.safetensors"):
            tensors |= load_file(file)

        def largest(layer, projection, total, count):
            weight = tensors[f"model.layers.{layer}.{projection}.weight"].float()
            return weight.reshape(len(weight), total, -1).pow(2).sum((0, 2)).topk(count).indices.sort().values

        units = {"neurons": [largest(*pair) for pair in _each(layers, "mlp.down_proj", 1536, widths)]}
        if groups is not None:
            total = dense.config["num_key_value_heads"]
            units["kv_groups"] = [largest(*pair) for pair in _each(layers, "self_attn.o_proj", total, groups)]
        write(dense, Kept(tuple(layers), units), root / name)
        return root / name

    return make


def _each(layers, projection, total, counts):
    return [(layer, projection, total, count) for layer, count in zip(layers, counts, strict=True)]


def _with_a_group_for_each_head(real_assets, root):
    """Make the same function with 9 KV groups instead of 3."""
    target = root / "llama-9-groups"
    shutil.copytree(real_assets / "llama", target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if ".k_proj." in name or ".v_proj." in name]:
            repeated = tensors[name].reshape(3, 64, -1).repeat_interleave(3, 0)
            tensors[name] = repeated.reshape(576, -1).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})
    write_json(target / "config.json", read_json(target / "config.json") | {"num_key_value_heads": 9})
    return target


@pytest.mark.engine(*ENGINES)
@pytest.mark.parametrize("name", [*PRUNED, *BY_MAGNITUDE])
def test_engines_compute_what_the_table_says_they_load(made, name, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.set_num_threads(1)
    checkpoint = made(name)
    checks = check(checkpoint, {engine: python_of(engine) for engine in ENGINES if is_there(engine)})
    print(name, *(f"{engine}: {found.line()}" for engine, found in checks.items()), sep="\n")
    config = read_json(checkpoint / "config.json")
    assert {engine: not found.failure for engine, found in checks.items()} == {
        engine: fit(engine, config).loads for engine in checks
    }

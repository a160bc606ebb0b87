"""Prune stages of a tiny model whose importance artifact has random scores."""

import zlib

import torch
from made_stages import stage_of
from ranks import SoloWorld
from safetensors.torch import save_file
from tiny import save_tiny

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.methods import CRITERIA
from hfprune_dist.stages import prune
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

IMPORTANCE = stage_of("importance", "llama", {}, {})


def prepare(folder, shard_size="5GB", criterion="entropy", samples=9, variant="llama", **method):
    """Prepare a store with an importance artifact of random scores by every criterion, and a stage that prunes by one.

    What is drawn doesn't depend on which criteria exist.
    """
    store = Store(folder / "store")
    draft = store.handle(IMPORTANCE.id).open_draft()
    names = [f"layers.{layer}.{name}" for name in CRITERIA for layer in range(2)]
    scores = {name: torch.rand(48, generator=seeded(name), dtype=torch.float64) for name in names}
    save_file(scores, draft / "importance.safetensors")
    windows_ST = torch.randint(264, (samples, 20), generator=seeded("windows"))
    save_file({"input_ids": windows_ST}, draft / "windows.safetensors")
    store.handle(IMPORTANCE.id).commit(IMPORTANCE, draft, {"metrics": {}})
    model = save_tiny(folder / "model", variant, shard_size=shard_size)
    settings = {"allocation": "global", "floor": 0.2, "protect_first": 0, "protect_last": 0, "multiple_of": 1}
    calibration = {"dtype": "float32", "micro_batch_size": 2}
    uniform = {"allocation": "uniform", "refit": "none"}
    params = {"ratio": 0.2, "criterion": criterion, **settings, **calibration, **uniform, **method}
    identity = FileHashes(None).of_folder(model)
    stage = stage_of(
        "prune", "llama", params, {"model": Input(identity, str(model)), "importance": IMPORTANCE.as_input()}
    )
    return store, stage, scores


def seeded(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1)


def run_solo(store, stage):
    world = SoloWorld()
    store.work(stage.id).mkdir(parents=True, exist_ok=True)
    prune.run(Context(stage, store, world, RuntimeConfig(), Progress(None), {}, {}, 1))


def weights_of(store, stage):
    return {file.name: file.read_bytes() for file in store.path(stage.id).glob("*.safetensors")}

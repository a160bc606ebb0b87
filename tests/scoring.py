"""The importance stage over a tiny model, to be run in forks of the test's process."""

from tiny import importance_stage, save_tiny, write_documents

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed import zero3  # noqa: F401  imported here once, not in every fork
from hfprune_dist.stages import importance
from hfprune_dist.stages.context import Context
from hfprune_dist.store.heartbeat import Progress

LAYERS = 3


def make_stage(folder, variant="llama", dtype="float32", criteria=("entropy", "surgeon"), structures=("neurons",)):
    save_tiny(folder / "model", variant, num_hidden_layers=LAYERS)
    write_documents(folder / "text.jsonl")
    calibration = {"samples": 6, "sequence_length": 24, "micro_batch_size": 1, "shard_size": 2, "text_field": "text"}
    params = {
        "calibration": calibration,
        "criteria": sorted(criteria),
        "dtype": dtype,
        "add_bos_token": True,
        "seed": 3,
        **({} if structures == ("neurons",) else {"structures": list(structures)}),
    }
    return importance_stage(folder, variant, params)


def run(store, stage, world):
    store.handle(stage.id).work.mkdir(parents=True, exist_ok=True)
    claim = store.handle(stage.id).claim("test") if world.is_first else None
    importance.run(Context(stage, store, world, RuntimeConfig(), Progress(None), {}, {}, 1, claim))


def files_of(store, stage):
    return {file.name: file.read_bytes() for file in store.handle(stage.id).artifact.glob("*.safetensors")}

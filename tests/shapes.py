"""The prune stage of methods that search for a shape, over tiny models with random scores."""

import torch
from made_stages import being_made, stage_of
from masking import kept_by_kind
from ranks import metrics_of
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input
from hfprune_dist.structures.score_names import score_name

IMPORTANCE = stage_of("importance", "tiny", {}, {})
LAYERS, GROUPS, QUERIES, NEURONS = 4, 4, 2, 48
MICRO_BATCH = 2


def prepare(folder, variant="llama", *, samples=9, layers=LAYERS, groups=GROUPS, worth=1.0, model=None, **settings):
    """A store with an importance artifact of random scores, and the stage that searches for a shape by them.

    ``model``: folder of the model, if it isn't a ``variant`` of tiny sizes. ``worth``: of a group's score, relative to
    a neuron's. ``settings``: of the stage.
    """
    folder.mkdir(exist_ok=True)
    store = Store(folder / "store")
    generator = torch.Generator().manual_seed(0)
    criterion = settings.get("criterion", "entropy")
    if model is None:
        heads = {"num_key_value_heads": groups, "num_attention_heads": groups * QUERIES}
        sizes = {"intermediate_size": NEURONS, "num_hidden_layers": layers}
        biases = {"attention_bias": True} if variant == "qwen3" else {}
        model = save_tiny(folder / "model", variant, **sizes, **heads, **biases)
    checkpoint, structures = open_checkpoint(model), settings.get("structures", ["neurons"])
    experts = checkpoint.family.experts
    kinds = checkpoint.pruned_kinds(structures if experts else ["neurons", "kv_groups"])
    scores = {
        score_name(layer, criterion, units.kind): torch.rand(units.counts[layer], generator=generator).double()
        * (worth if units.kind == "kv_groups" else 1.0)
        for layer in range(checkpoint.num_layers)
        for units in kinds
    }
    windows_ST = torch.randint(3, min(264, checkpoint.config["vocab_size"]), (samples, 12), generator=generator)
    with being_made(store, IMPORTANCE) as draft:
        save_file(scores, draft / "importance.safetensors")
        save_file({"input_ids": windows_ST}, draft / "windows.safetensors")
    defaults = {
        "ratio": 0.2,
        "criterion": "entropy",
        "allocation": "plain",
        "refit": "dense",
        "effort": "quick",
        "multiple_of": 1,
        "structures": ["neurons", "kv_groups", "layers"],
        "dtype": "float32",
        "micro_batch_size": MICRO_BATCH,
    }
    inputs = {"model": Input(FileHashes(None).of_folder(model), str(model)), "importance": IMPORTANCE.as_input()}
    params = {**defaults, **settings}
    if params["structures"] == ["neurons"]:  # records leave the default out
        del params["structures"]
    return store, stage_of("prune", "tiny", params, inputs)


def outcome(store, stage):
    """Return everything that must have the same bits."""
    folder = store.handle(stage.id).artifact
    names = ("model.safetensors", "kept.json", "config.json")
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    return files, metrics_of(store, stage)


def kept_of(store, stage):
    return kept_by_kind(store.handle(stage.id).artifact)


def windows_of(store):
    return load_file(store.handle(IMPORTANCE.id).artifact / "windows.safetensors")["input_ids"]


def scores_of(store):
    return load_file(store.handle(IMPORTANCE.id).artifact / "importance.safetensors")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def divergence(dense, model, windows_ST, every=1):
    """KL divergence in nats per token, over one in ``every`` tokens."""
    log_p, log_q = (each(windows_ST, use_cache=False).logits.double().log_softmax(-1) for each in (dense, model))
    return (log_p.exp() * (log_p - log_q)).sum(-1)[:, ::every].mean().item()

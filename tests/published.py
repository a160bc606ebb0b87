"""Checkpoints of published shapes whose weights are holes in files, because a plan reads only their headers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ranks import ROOT
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.load import load_config
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.kinds.dimensions import dimensions_of
from hfprune_dist.kinds.memory import Gpus
from hfprune_dist.kinds.placement import choose_micro_batches
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import ModelSource
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.hashing import FileHashes


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int = 32000) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": vocabulary > 32000,
    }


SHAPES = {
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128256),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128256) | {"head_dim": 128},
    "qwen2.5-1.5b": _llama(1536, 8960, 28, 12, 2, 151936),
}


def published_model(folder: Path, name: str) -> ModelSource:
    """Write a model with the shape of a published one under ``folder``, and return it as a sweep's model."""
    config_class, model_class = (Qwen2Config, Qwen2ForCausalLM) if "qwen" in name else (LlamaConfig, LlamaForCausalLM)
    with torch.device("meta"):
        model = model_class(config_class(**SHAPES[name]))
    path = folder / name
    path.mkdir(parents=True)
    model.config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    _write_holes(path / "model.safetensors", {it: w.shape for it, w in model.state_dict().items() if it not in tied})
    return ModelSource(name, open_checkpoint(path), name, name, "commit")


def _write_holes(file: Path, shapes: dict[str, torch.Size]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def published_plan(
    models: Sequence[ModelSource], methods: Sequence[str], gpus: Gpus, **overrides: object
) -> tuple[SweepConfig, Plan]:
    """Plan configs/sweeps/paper.yaml with these models and methods; dots in keys are written as ``__``."""
    changed = {"methods": list(methods), **{key.replace("__", "."): value for key, value in overrides.items()}}
    config = load_config([ROOT / "configs" / "sweeps" / "paper.yaml"], changed)
    dims = [dimensions_of(it.checkpoint.config) for it in models]
    resolved = resolve_methods(config, ROOT / "configs" / "methods")
    config = choose_micro_batches(config, dims, {"recovery": gpus, "distillation": gpus}, resolved.values())
    return config, build_plan(config, models, resolved, FileHashes(None))

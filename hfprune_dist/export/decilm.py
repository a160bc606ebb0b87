"""A checkpoint as NVIDIA's DeciLM (nemotron-nas): the same weights under another config.json."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import MODELING_FILE, plain_config, write_config
from hfprune_dist.checkpoints.weight_files import INDEX_FILE
from hfprune_dist.errors import UserError, naming
from hfprune_dist.export import AS_IT_IS, CONFIGURATION_FILE, require_family
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.structures.units import OUTPUT_BIASES

# To which engines round the width that they compute from ffn_mult; of them, vLLM alone reads widths themselves.
_MULTIPLE = 256


def write_decilm(checkpoint: Checkpoint, target: Path) -> str:
    """Write a checkpoint as a DeciLM into a new folder, with the class that vLLM needs; return what to tell of it.

    Raises:
        UserError: if a DeciLM can't have the checkpoint's layers.
    """
    logging.set_verbosity_error()
    groups, own = checkpoint.structures["kv_groups"], checkpoint.family.model_type
    require_family(checkpoint, ("llama", "mistral", "qwen2"), "DeciLM", AS_IT_IS)
    if checkpoint.config.get(OUTPUT_BIASES):
        raise UserError(f"{checkpoint.path}: DeciLM has no place for {OUTPUT_BIASES}; {AS_IT_IS}")
    if not groups.is_uniform:
        raise UserError(f"{checkpoint.path}: layers that differ in heads need --to gguf; {AS_IT_IS}")
    heads = {field: row[0] for field, row in groups.values(groups.counts).items()}
    sizes = checkpoint.family.completed(checkpoint.config) | heads
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise UserError(f"{checkpoint.path}: the number of a DeciLM's heads must divide its hidden_size; {AS_IT_IS}")
    target.mkdir()
    shutil.copyfile(CONFIGURATION_FILE, target / CONFIGURATION_FILE.name)
    for name in {*checkpoint.travelling_files, *checkpoint.weight_files, INDEX_FILE} - {MODELING_FILE.name}:
        if (checkpoint.path / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            with naming(target / name):
                shutil.copyfile(checkpoint.path / name, target / name)
    write_config(plain_config(checkpoint) | heads | {"head_dim": sizes["head_dim"]}, target)
    attention = {"no_op": False, "n_heads_in_group": sizes["num_attention_heads"] // sizes["num_key_value_heads"]}
    widths = checkpoint.units.counts
    rounded = all(width % _MULTIPLE == 0 for width in widths)
    multiples = [round(1.5 * (width - _MULTIPLE // 2) / sizes["hidden_size"], 6) for width in widths]
    name, values = ("ffn_mult", multiples) if rounded else ("intermediate_size", widths)
    blocks = [{"attention": attention, "ffn": {"no_op": False, name: value}} for value in values]
    stated = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "auto_map": {"AutoConfig": f"{CONFIGURATION_FILE.stem}.DeciLMConfig"},
        "qkv_bias": own == "qwen2" or bool(checkpoint.config.get("attention_bias")),
    }
    write_json(target / "config.json", read_json(target / "config.json") | stated)
    return "load it in vLLM with --trust-remote-code" + ("" if rounded else "; mlx-lm needs multiples of 256 as widths")

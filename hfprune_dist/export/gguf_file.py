"""A checkpoint as one GGUF file, which llama.cpp reads: written tensor by tensor, never the whole model in memory.

llama.cpp has an architecture for layers that differ in heads and widths: ``deci``, made for NVIDIA's pruned Llamas. It
computes a Llama, with arrays of sizes in place of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import open_weights
from hfprune_dist.errors import UserError, naming
from hfprune_dist.export import AS_IT_IS, require_family
from hfprune_dist.export.gguf_tokenizer import add_tokenizer

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # llama.cpp's names
_INTERLEAVED = ("llama", "deci")  # which rotate neighbouring channels, not one of either half of a head


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file; in heads of ``head_dim`` channels, those that rotate together become neighbours."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], Tensor]
    head_dim: int | None = None

    def stored(self) -> np.ndarray[Any, Any]:
        whole = self.read().float()
        if self.head_dim:
            heads = whole.view(-1, 2, self.head_dim // 2, *whole.shape[1:])
            whole = heads.transpose(1, 2).reshape(whole.shape)
        if self.kind == Kind.F16 and (whole.isfinite() & whole.half().isinf()).any():
            raise UserError(f"{self.name} has values beyond float16's; choose --dtype bf16")
        if self.kind == Kind.Q8_0 and not (whole / 127).half().isfinite().all():  # its scales are float16
            raise UserError(
                f"{self.name} has values beyond q8_0's; choose --dtype bf16, or fix those that aren't finite"
            )
        return np.asarray(gguf.quants.quantize(whole.contiguous().numpy(), self.kind))


def write_gguf(checkpoint: Checkpoint, file: Path, dtype: str | None = None) -> str:
    """Write a checkpoint as a GGUF file, with its tokenizer; return what to tell of it. Matrices have the ``dtype``, by
    default the checkpoint's, which changes no number; all else is float32, as llama.cpp wants it.

    Raises:
        UserError: if llama.cpp couldn't load the model, or would compute another.
    """
    logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    architecture = _architecture(checkpoint, config)
    chosen = dtype or checkpoint.tensors[checkpoint.family.embedding_tensor].dtype.lower().replace("64", "32")
    writer = gguf.GGUFWriter(file, architecture)
    gguf.Metadata.load(None, checkpoint.path).set_gguf_meta_model(writer)  # of its card: name, licence
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if chosen == "f32" else f"MOSTLY_{chosen.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, checkpoint, config)
    add_tokenizer(writer, checkpoint.path, int(checkpoint.config["vocab_size"]))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], checkpoint.num_layers)
    renamed = partial(names.get_name, try_suffixes=(".weight", ".bias"))
    kind, tensors = Kind[chosen.upper()], list[_Tensor]()
    head_dim = checkpoint.family.completed(checkpoint.config)["head_dim"] if architecture in _INTERLEAVED else None
    with naming(file), open_weights(checkpoint) as read:
        for name, info in checkpoint.tensors.items():
            if name != checkpoint.family.head_tensor or not checkpoint.config["tie_word_embeddings"]:
                fits = info.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
                stored = Kind.F32 if len(info.shape) == 1 else kind if fits else Kind.F16
                rotated = head_dim if ".q_proj." in name or ".k_proj." in name else None
                tensors.append(_Tensor(renamed(name), info.shape, stored, partial(read, name), rotated))
        if config.rope_parameters["rope_type"] == "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            usual = config.rope_parameters["rope_theta"] ** -(torch.arange(len(scaled)).double() / len(scaled))
            factors = usual / scaled  # by which llama.cpp divides the frequencies of rotary embeddings
            tensors.append(_Tensor("rope_freqs.weight", (len(factors),), Kind.F32, lambda: factors))
        for tensor in tensors:
            numbers, size = gguf.GGML_QUANT_SIZES[tensor.kind]
            size *= math.prod(tensor.shape) // numbers
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.stored())
        writer.close()
    halves = sum(tensor.kind == Kind.F16 for tensor in tensors) if chosen == "q8_0" else 0
    told = f"; {halves} matrices, whose rows aren't multiples of 32 (prune.multiple_of), as f16" if halves else ""
    return f"architecture {architecture}, {chosen}{told}"


def _architecture(checkpoint: Checkpoint, config: Any) -> str:
    """llama.cpp's architecture that computes what the checkpoint does."""
    require_family(checkpoint, ARCHITECTURES, "GGUF", "llama.cpp's converter reads plain checkpoints of others")
    own, sizes = checkpoint.family.model_type, checkpoint.family.completed(checkpoint.config)
    rope, rotated = config.rope_parameters["rope_type"], config.rope_parameters.get("partial_rotary_factor")
    if rope not in ("default", "llama3") or rotated not in (None, 1.0) or config.hidden_act != "silu":
        found = f"rope_type {rope}, partial_rotary_factor {rotated}, hidden_act {config.hidden_act}"
        raise UserError(f"{checkpoint.path}: GGUF is written with rope_type default or llama3, and silu; not {found}")
    if not checkpoint.is_plain:
        if own == "qwen3":
            why = "where layers differ, llama.cpp has no norms of queries and keys; a plain shape can be written"
            raise UserError(f"{checkpoint.path}: {why}; {AS_IT_IS}")
        return "deci"
    has_all_heads = sizes["num_attention_heads"] * sizes["head_dim"] == sizes["hidden_size"]
    return "llama" if own == "qwen2" and not has_all_heads else ARCHITECTURES[own]  # which has biases too


def _add_sizes(writer: gguf.GGUFWriter, checkpoint: Checkpoint, config: Any) -> None:
    """Write the model's hyperparameters; one number for all layers unless they may differ."""
    sizes = checkpoint.family.completed(checkpoint.config)
    for units in checkpoint.structures.values():
        for field, row in units.values(units.counts).items():
            sizes[field] = row if writer.arch == "deci" else max(row)
    writer.add_block_count(checkpoint.num_layers)
    writer.add_context_length(checkpoint.max_positions or config.max_position_embeddings)
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(sizes["vocab_size"])

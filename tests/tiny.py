"""Tiny random models, tokenizers and texts: real architectures and files, but milliseconds of work."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from made_stages import stage_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from written_once import write_once

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input, Stage

# One token per byte: the only tokenizer that every family's tokenizer class builds in the same way.
VOCABULARY = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
WORDS = [a + b + c for a in "bdfgklmnprstv" for b in "aeiou" for c in "nrstl"]
SHAPE = {
    "vocab_size": 264,  # room for the special tokens that tokenizer classes add themselves
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Every family, with and without biases and tied embeddings.
VARIANTS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama-tied-biases": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True},
    ),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"tie_word_embeddings": False, "sliding_window": None}),
}

# The names of their parts.
FAMILY = Family("llama", "Llama")


def tiny_model(variant: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    """Return a random float32 model whose outputs are far from uniform."""
    config_class, model_class, options = VARIANTS[variant]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **options, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1.0)
    return model


def tiny_tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer without merges."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = {"special_tokens": [("<s>", vocabulary["<s>"])]} if adds_bos else {}
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A" if adds_bos else "$A", **bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save_tiny(
    folder: Path,
    variant: str = "llama",
    *,
    shard_size: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Path:
    """Write a checkpoint folder as a user has it."""

    def make(empty: Path) -> None:
        tiny_model(variant, **options).to(dtype).save_pretrained(empty, max_shard_size=shard_size)
        tiny_tokenizer().save_pretrained(empty)

    return write_once(folder, f"{VARIANTS[variant]} {shard_size} {dtype} {sorted(options.items())}", make)


def edit_json(file: Path, *gone: str, **changes: object) -> None:
    """Leave out entries of the JSON object in a file, and change others."""
    before = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in before.items() if key not in gone} | changes))


def tiny_text(words: int, seed: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words))


def write_documents(file: Path, count: int = 12, words: int = 40, seed: int = 0) -> Path:
    """Write a jsonl file of random documents."""
    lines = [json.dumps({"text": tiny_text(words, seed * 1000 + number)}) for number in range(count)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def write_pairs(file: Path) -> Path:
    """Write a jsonl file of 40 random instruction pairs."""
    generator = random.Random(0)
    lines = [
        json.dumps({"instruction": tiny_text(6, number), "response": tiny_text(generator.randint(3, 12), -number)})
        for number in range(40)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def importance_stage(folder: Path, label: str, params: dict[str, Any]) -> Stage:
    """Return the stage over the model and text in a folder, as ``save_tiny`` and ``write_documents`` leave them."""
    model, text, hashes = folder / "model", folder / "text.jsonl", FileHashes(None)
    inputs = {
        "model": Input(hashes.of_folder(model), str(model)),
        "calibration": Input(hashes.of_file(text), str(text)),
    }
    return stage_of("importance", label, params, inputs)

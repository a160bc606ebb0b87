"""A tokenizer in a GGUF file: its tables, and llama.cpp's name for how it splits text before these apply."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType as Type

from hfprune_dist.data.tokenizer import bos_ids, load_tokenizer, plain_ids, require_embedded
from hfprune_dist.errors import UserError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_WORD = {"type": "Split", "behavior": "Isolated", "invert": False}
_QWEN2, _LLAMA3 = (_WORD | {"pattern": {"Regex": _WORDS.replace("NUMBER", part)}} for part in (r"\p{N}", r"\p{N}{1,3}"))
_DIGIT, _BYTES = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}
_BYTES_ALONE, _GPT2 = _BYTES | {"use_regex": False}, _BYTES | {"use_regex": True}
# llama.cpp's name -> the steps by which text is split, and whether words that are tokens skip the merges.
SPLITS = {
    "gpt-2": ([_GPT2], False),
    "smollm": ([_DIGIT, _GPT2], False),
    "qwen2": ([_QWEN2, _BYTES_ALONE], False),
    "llama-bpe": ([_LLAMA3, _BYTES_ALONE], True),
}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Write a folder's tokenizer, as transformers loads it, for a model with so many rows of embeddings.

    Raises:
        UserError: if llama.cpp would make other tokens of a text, or tokens have no embedding.
    """
    require_embedded(tokenizer := load_tokenizer(folder), rows, folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    before, bare, whole = bos_ids(tokenizer), plain_ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    behind = whole[len(before) + len(bare) :]
    simple = before in ([], [tokenizer.bos_token_id]) and behind in ([], [tokenizer.eos_token_id])
    if (splits := _splits_as(backend)) is None or not simple:
        known = f"byte-level BPE that splits text as {', '.join(SPLITS)}, with bos or eos at most"
        way_round = "llama.cpp's converter reads plain checkpoints"
        raise UserError(f"{folder}: its tokenizer can't be written to GGUF, only {known}; {way_round}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    types = dict.fromkeys(range(rows), Type.UNUSED) | dict.fromkeys(tokens, Type.NORMAL)
    types |= {own["id"]: Type.CONTROL if own["special"] else Type.USER_DEFINED for own in backend["added_tokens"]}
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types([types[number] for number in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    for role in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None and number < rows:
            getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(behind))
    templates = tokenizer.chat_template
    if template := templates.get("default") if isinstance(templates, dict) else templates:
        writer.add_chat_template(template)


def _splits_as(backend: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer of byte-level BPE splits text; None if it has none."""
    match backend:
        case {"model": {"type": "BPE", "byte_fallback": False}, "normalizer": None | {"type": "NFC"}}:
            first = backend["pre_tokenizer"] or {}
            parts = first.get("pretokenizers", [first])
            steps = [{key: value for key, value in part.items() if key != "trim_offsets"} for part in parts]
            found = steps, backend["model"]["ignore_merges"]
            return next((name for name, known in SPLITS.items() if known == found), None)
    return None

"""A tokenizer in a GGUF file: its tables, and llama.cpp's name for how it splits text before these apply."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from hfprune_dist.data.tokenizer import load_tokenizer, require_embedded
from hfprune_dist.errors import UserError

_GPT2, _DIGITS = "the expression of GPT-2", "single digits"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
# The expressions by which text is split, one after another, and whether words that are tokens skip the merges -> name.
_SPLITS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_WORDS.replace("NUMBER", r"\p{N}"),), False): "qwen2",
    ((_WORDS.replace("NUMBER", r"\p{N}{1,3}"),), True): "llama-bpe",
}


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Write a folder's tokenizer, as transformers loads it, for a model with so many rows of embeddings.

    Raises:
        UserError: if llama.cpp would make other tokens of a text, or tokens have no embedding.
    """
    tokenizer = load_tokenizer(folder)
    require_embedded(tokenizer, rows, folder)
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    before, behind = whole[: whole.index(bare[0])], whole[whole.index(bare[-1]) + 1 :]
    known = before in ([], [tokenizer.bos_token_id]) and behind in ([], [tokenizer.eos_token_id])
    splits = _splits_as(backend) if known else None
    if splits is None:
        known_splits = f"byte-level BPE that splits text as {', '.join(_SPLITS.values())}, with bos or eos at most"
        raise UserError(f"{folder}: its tokenizer can't be written to GGUF, only {known_splits}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splits)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    control, own = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    types |= {added["id"]: control if added["special"] else own for added in backend["added_tokens"]}
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in range(rows)])
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
            steps = [_step(part) for part in first.get("pretokenizers", [first])]
            return _SPLITS.get((tuple(step for step in steps if step), backend["model"]["ignore_merges"]))
    return None


def _step(part: Mapping[str, Any]) -> str:
    """The expression by which one step splits text; empty if it doesn't split."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}:
            return _GPT2 if splits else ""
        case {"type": "Digits", "individual_digits": True}:
            return _DIGITS
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return f"unknown: {part}"

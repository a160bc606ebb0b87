"""The tokenizer of a checkpoint, and the token that begins a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from hfprune_dist.errors import UserError


def load_tokenizer(checkpoint: Path) -> Any:
    """Load the tokenizer of a checkpoint folder.

    Raises:
        UserError: where its files are missing or damaged.
    """
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except Exception as error:  # tokenizers, in Rust, raises the base class
        raise UserError(f"{checkpoint}: the tokenizer can't be loaded ({error})") from None


def bos_id(tokenizer: Any, add_bos_token: bool) -> int | None:
    """The id that begins every sequence; None where it isn't wanted or the tokenizer has none (Qwen)."""
    return tokenizer.bos_token_id if add_bos_token else None


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without special tokens; texts longer than the model's context are fine here."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

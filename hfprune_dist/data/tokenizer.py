"""The tokenizer of a checkpoint, and the token that begins a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers.utils import logging

from hfprune_dist.errors import UserError


def load_tokenizer(checkpoint: Path) -> Any:
    """Load the tokenizer of a checkpoint folder, whose own code isn't run."""
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, mistral_format=False)
    except Exception as error:  # tokenizers, in Rust, raises the base class
        raise UserError(f"{checkpoint}: the tokenizer can't be loaded ({type(error).__name__}: {error})") from None
    return tokenizer


def bos_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts before a text, where the model knows them from its training: a BOS token,
    or none, even if it names one (SmolLM2, Qwen).
    """
    ids, plain = list(tokenizer("a")["input_ids"]), plain_ids(tokenizer, "a")
    places = [place for place in range(len(ids)) if plain and ids[place : place + len(plain)] == plain]
    return ids[: places[-1]] if places else []


def plain_ids(tokenizer: Any, texts: str | list[str]) -> list[Any]:
    """Token ids of a text, or of each of several, without special tokens; they may exceed the model's context."""
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def append_nothing(tokenizer: Any) -> None:
    """Have the tokenizer put nothing after a text: EOS there ends a prompt, and counts as part of an answer."""
    bos = bos_ids(tokenizer)
    if tokenizer.is_fast and tokenizer("a")["input_ids"] != [*bos, *plain_ids(tokenizer, "a")]:
        tokens = tokenizer.convert_ids_to_tokens(bos)
        known = list(zip(tokens, bos, strict=True))
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=[*tokens, "$A"], special_tokens=known)


def require_eos(tokenizer: Any, where: Path) -> None:
    """Refuse a tokenizer without the token that ends a response."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: the tokenizer has no end-of-sequence token; name one in tokenizer_config.json")


def require_embedded(tokenizer: Any, rows: int, where: Path) -> None:
    """Refuse a tokenizer that can produce ids without a row in the table of embeddings. Tokens for padding and unknown
    text may lie beyond it: many tokenizers have them without using them.
    """
    idle = {tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.bos_token, tokenizer.eos_token}
    used = ((token, index) for token, index in tokenizer.get_vocab().items() if token not in idle)
    token, largest = max(used, key=lambda entry: entry[1], default=("", -1))
    if largest >= rows:
        raise UserError(
            f"{where}: the tokenizer gives the token {token!r} the id {largest}, but the embedding has {rows} rows; "
            "add rows with resize_token_embeddings, or take the token out of the tokenizer's files"
        )


def require_chat(tokenizer: Any, where: Path) -> None:
    """Refuse a tokenizer without a chat template that can be rendered."""
    if not tokenizer.chat_template:
        raise UserError(f"{where}: the tokenizer has no chat template, which evaluation.apply_chat_template needs")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    except Exception as error:  # a template is a program: anything can happen
        raise UserError(
            f"{where}: the tokenizer's chat template can't be rendered ({type(error).__name__}: {error}); fix it, or "
            "set evaluation.apply_chat_template to false"
        ) from None

"""Checkpoints in the formats of other engines, for those that can't read a pruned one as it is."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.errors import UserError

CONFIGURATION_FILE = Path(__file__).with_name("configuration_decilm.py")
AS_IT_IS = "transformers and vLLM load the checkpoint as it is (trust_remote_code)"


def require_gguf() -> None:
    """Refuse to write GGUF files without the library that does."""
    if find_spec("gguf") is None:
        raise UserError("GGUF is written by llama.cpp's library; run: pip install 'gguf>=0.19'")


def require_family(checkpoint: Checkpoint, families: Iterable[str], written: str, others: str) -> None:
    """Refuse a checkpoint of another family than these, for which ``others`` says what to do, and what none of them can
    have in the format ``written``.
    """
    own, config = str(checkpoint.whole["model_type"]), checkpoint.config
    if own not in families:
        raise UserError(f"{checkpoint.path}: {written} is written for {', '.join(families)}, not for a {own}; {others}")
    if checkpoint.ranks:
        raise UserError(f"{checkpoint.path}: {written} can't hold attention of low rank; transformers loads it")
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window", own == "mistral") else None
    if window is not None and window < (checkpoint.max_positions or 0):
        raise UserError(f"{checkpoint.path}: {written} has no sliding_window, here {window}; {AS_IT_IS}")

"""What tensors are called in a checkpoint's files, where transformers calls them otherwise once they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_dist.checkpoints.text_decoder import has_vision

# model_type -> (what the names of modules begin with, and what those in files may begin with).
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {"gpt_neox": (("lm_head.", "embed_out."),)}
# The same of text decoders inside models of images and text.
_OF_DECODERS = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    *((f"model.language_model.{part}.", f"model.{part}.") for part in ("embed_tokens", "layers", "norm")),
)


@dataclass(frozen=True)
class StoredNames:
    """Beginnings of names: (in modules, in files) of those that differ."""

    prefixes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], names: Iterable[str]) -> StoredNames:
        """Of a checkpoint with such a ``config.json``.

        Args:
            names: of all tensors in its files.
        """
        pairs = _OF_DECODERS if has_vision(config) else _RENAMED.get(str(config.get("model_type")), ())
        every = list(names)
        return cls(tuple(pair for pair in pairs if any(name.startswith(pair[1]) for name in every)))

    def in_modules(self, name: str) -> str:
        """What a tensor in the files is called in a model."""
        return next((ours + name.removeprefix(its) for ours, its in self.prefixes if name.startswith(its)), name)

    def in_files(self, name: str) -> str:
        """What a tensor of a model is called in the files."""
        return next((its + name.removeprefix(ours) for ours, its in self.prefixes if name.startswith(ours)), name)


# Where files call all tensors as modules do.
SAME = StoredNames()

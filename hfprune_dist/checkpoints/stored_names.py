"""What tensors are called in a checkpoint's files, where transformers calls them otherwise once they are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# model_type -> (what the names of modules begin with, and what those in files may begin with).
_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {"gpt_neox": (("lm_head.", "embed_out."),)}


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
        pairs = _RENAMED.get(str(config.get("model_type")), ())
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

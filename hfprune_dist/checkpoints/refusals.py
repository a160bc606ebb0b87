"""Errors about a config.json that can't be followed: its model is of an unsupported kind, or it isn't true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_dist.checkpoints.families import not_supported
from hfprune_dist.errors import UserError


@dataclass(frozen=True)
class Refusals:
    """The errors to raise about one config.json, one for each kind of reason.

    Attributes:
        where: the file, for messages.
    """

    config: Mapping[str, Any]
    where: str

    def unsupported(self, why: str) -> UserError:
        """The architecture isn't supported."""
        return not_supported(self.config, self.where, why)

    def invalid(self, key: str, value: Any, valid: str) -> UserError:
        """The value of a key, or the architecture's default if the key is missing, isn't allowed."""
        return UserError(f"{self.where}: {key} must be {valid}, not {value!r}")

    def inconsistent(self, why: str) -> UserError:
        """Two keys can't both be true."""
        return UserError(f"{self.where}: it contradicts itself: {why}")

    def unlike_tensors(self, why: str) -> UserError:
        """config.json doesn't describe the model whose tensors are next to it."""
        return UserError(f"{self.where}: it contradicts the tensors in the weight files: {why}")

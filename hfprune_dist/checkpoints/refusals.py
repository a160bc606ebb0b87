"""What to tell of a config.json that can't be followed: it is of a kind that isn't pruned, or it isn't true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfprune_dist.checkpoints.families import not_supported
from hfprune_dist.errors import UserError


@dataclass(frozen=True)
class Refusals:
    """Of one config.json, what to raise for each kind of reason.

    Attributes:
        where: the file, for messages.
    """

    config: Mapping[str, Any]
    where: str

    def unsupported(self, why: str) -> UserError:
        """The architecture isn't pruned."""
        return not_supported(self.config, self.where, why)

    def invalid(self, key: str, value: Any, valid: str) -> UserError:
        """A key has a value, or where it is missing an architecture takes one, that it can't have."""
        return UserError(f"{self.where}: {key} must be {valid}, not {value!r}")

    def inconsistent(self, why: str) -> UserError:
        """Two keys can't both be true."""
        return UserError(f"{self.where}: it contradicts itself: {why}")

    def unlike_tensors(self, why: str) -> UserError:
        """It isn't of the model whose tensors are beside it."""
        return UserError(f"{self.where}: it contradicts the tensors in the weight files: {why}")

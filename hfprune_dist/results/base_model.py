"""What a card tells of the dense model that a checkpoint comes from: where it is found, and its licence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hfprune_dist.store.atomic_files import read_object
from hfprune_dist.store.stage import Input

CARD = "README.md"
_LICENCE = ("license", "license_name", "license_link")
_CARRIED_OVER = (*_LICENCE, "language")
_HUB_CACHE = "models--"


@dataclass(frozen=True)
class BaseModel:
    """A dense checkpoint.

    Attributes:
        name: what the sweep calls it.
        identity: digest of its content.
        hub_id: ``org/name``; None where it is known as a folder only.
        revision: commit on the hub, None without a hub id.
        carried: entries of its card's metadata that hold for what is made of it: licence and language.
    """

    name: str
    identity: str
    hub_id: str | None
    revision: str | None
    carried: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, source: Input) -> BaseModel:
        """What is known of a checkpoint that stages read; one that has been removed since is known by its name."""
        folder = Path(source.location)
        hub_id, revision = _place_on_hub(folder) if source.content == "commit" else (None, None)
        return cls(name, source.identity, hub_id, revision, _carried_over(folder))

    @property
    def licence(self) -> str | None:
        """The licence's identifier, or the name of one that has none."""
        named = self.carried.get("license_name") or self.carried.get("license")
        return None if named is None else str(named)


def _place_on_hub(snapshot: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a folder ``models--org--name/snapshots/commit`` of the hub's cache."""
    cached = snapshot.parent.parent.name
    if not cached.startswith(_HUB_CACHE):
        return None, None
    return cached.removeprefix(_HUB_CACHE).replace("--", "/"), snapshot.name


def _carried_over(folder: Path) -> dict[str, Any]:
    """From the card, or else, of the licence alone, from config.json."""
    metadata, config = _metadata(folder / CARD), read_object(folder / "config.json") or {}
    licence = {"license": config["license"]} if isinstance(config.get("license"), str) else {}
    return {key: value for key, value in {**licence, **metadata}.items() if key in _CARRIED_OVER and value}


def _metadata(card: Path) -> Mapping[str, Any]:
    """A card's metadata; none where there is no card, or none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}

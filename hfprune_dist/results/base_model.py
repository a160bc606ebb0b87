"""The dense model that a checkpoint comes from, as its card describes it: its place on the hub and its licence."""

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
        name: its name in the sweep.
        identity: digest of its content.
        hub_id: ``org/name``; None if it is known only as a folder.
        revision: commit on the hub, None without a hub id.
        carried: metadata of its card that also holds for models made from it: licence and language.
    """

    name: str
    identity: str
    hub_id: str | None
    revision: str | None
    carried: Mapping[str, Any]

    @classmethod
    def of(cls, name: str, source: Input) -> BaseModel:
        """Describe a checkpoint that stages read; of one that has been removed since, only the name is certain."""
        folder = Path(source.location)
        hub_id, revision = _place_on_hub(folder) if source.content == "commit" else (None, None)
        return cls(name, source.identity, hub_id, revision, _carried_over(folder))

    @property
    def licence(self) -> str | None:
        """Name of the licence, or its identifier where no name is given; None if it isn't known."""
        named = self.carried.get("license_name") or self.carried.get("license")
        return None if named is None else str(named)


def _place_on_hub(snapshot: Path) -> tuple[str | None, str | None]:
    """Hub id and commit of a folder ``models--org--name/snapshots/commit`` in the hub's cache."""
    cached = snapshot.parent.parent.name
    if not cached.startswith(_HUB_CACHE):
        return None, None
    return cached.removeprefix(_HUB_CACHE).replace("--", "/"), snapshot.name


def _carried_over(folder: Path) -> dict[str, Any]:
    """Licence and language from the card; the licence from config.json if the card has none."""
    metadata, config = _metadata(folder / CARD), read_object(folder / "config.json") or {}
    licence = {"license": config["license"]} if isinstance(config.get("license"), str) else {}
    stated = {key: _with_norwegian(value) for key, value in {**licence, **metadata}.items() if key in _CARRIED_OVER}
    return {key: value for key, value in stated.items() if value}


def _with_norwegian(stated: Any) -> Any:
    """A value of a card in which ``no``, the code of Norwegian, isn't taken for false, as YAML 1.1 does."""
    if isinstance(stated, list):
        return [_with_norwegian(it) for it in stated]
    return "no" if stated is False else stated


def _metadata(card: Path) -> Mapping[str, Any]:
    """A card's metadata; empty if there is no readable card."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}

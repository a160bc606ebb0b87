"""From the names a user gives to checkpoint folders with an identity."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from hfprune_dist.config import ModelAlias, SweepConfig, parse
from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.identity import FileHashes, digest_of
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class ModelSource:
    """A dense model of the sweep: its short name, its files, and the digest that stands for its content."""

    name: str
    checkpoint: Checkpoint
    identity: str


def resolve_models(config: SweepConfig, shipped: Path, hashes: FileHashes, download: bool) -> list[ModelSource]:
    """Find the folder and identity of every model of the sweep.

    Args:
        shipped: folder with the alias files that come with the project.
        download: fetch models of the hub that are not in the local cache; otherwise such a model is an error.

    Raises:
        UserError: for an unknown alias or a damaged checkpoint.
    """
    aliases = {**shipped_aliases(shipped), **config.aliases}
    sources = [_resolve(name, aliases, hashes, download) for name in config.models]
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--models: two models are called {name!r}; give one of them an alias")
    return sources


def shipped_aliases(folder: Path) -> dict[str, ModelAlias]:
    """Read the alias files of a folder: ``<alias>.yaml`` with a hub_id or a path."""
    return {
        file.stem: parse(ModelAlias, yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
        for file in sorted(folder.glob("*.yaml"))
    }


def _resolve(name: str, aliases: Mapping[str, ModelAlias], hashes: FileHashes, download: bool) -> ModelSource:
    alias = aliases.get(name)
    if alias is None:
        folder = Path(name).expanduser()
        if not (folder.is_dir() or os.sep in name):
            raise UserError(
                f"--models: unknown model {name!r}{did_you_mean(name, aliases)} valid: {', '.join(sorted(aliases))}, "
                "or the folder of a Hugging Face checkpoint"
            )
        return _local(folder.resolve().name, folder.resolve(), hashes)
    if alias.path is not None:
        return _local(name, Path(alias.path), hashes)
    assert alias.hub_id is not None
    checkpoint = open_checkpoint(_snapshot(name, alias.hub_id, alias.revision, download))
    # The last part of a snapshot's folder is the commit that the revision stood for.
    return ModelSource(name, checkpoint, _identity(checkpoint, digest_of([alias.hub_id, checkpoint.path.name])))


def _local(name: str, folder: Path, hashes: FileHashes) -> ModelSource:
    checkpoint = open_checkpoint(folder)
    files = checkpoint.weight_files + checkpoint.companion_files
    return ModelSource(name, checkpoint, _identity(checkpoint, hashes.of_files(folder, files)))


def _identity(checkpoint: Checkpoint, content: str) -> str:
    """The digest of a checkpoint's content; with its number of parameters where that isn't of all that is in the files.

    An earlier version counted these too, and what it made for a ratio isn't what that ratio means.
    """
    recounted = checkpoint.surplus or checkpoint.has_untied_head
    return digest_of([content, checkpoint.parameters]) if recounted else content


def _snapshot(name: str, hub_id: str, revision: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=not download)
        )
    except LocalEntryNotFoundError:
        action = "check the network" if download else "it is downloaded when the sweep runs without --dry-run"
        raise UserError(f"model {name!r}: {hub_id}@{revision} is not in the local hub cache; {action}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: no such name can be
        raise UserError(
            f"model {name!r}: {hub_id}@{revision} can't be downloaded: {error}; for a gated model, accept its licence "
            "on its page and run `hf auth login`"
        ) from None

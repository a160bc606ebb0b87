"""Finding checkpoints by the names that a user gives, and the hashes that identify their content."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from hfprune_dist.checkpoints.checkpoint import LICENCE_PATTERNS, Checkpoint, open_checkpoint
from hfprune_dist.config.load import absolute_path, is_hub_id, parse
from hfprune_dist.config.schema import ModelAlias, SweepConfig
from hfprune_dist.config.yaml_text import read_yaml
from hfprune_dist.errors import UserError, did_you_mean, hub_errors
from hfprune_dist.planning.stand_ins import stand_in
from hfprune_dist.planning.user_files import content_files
from hfprune_dist.store.hashing import FileHashes, digest_of
from hfprune_dist.store.stage import Content


@dataclass(frozen=True)
class ModelSource:
    """A dense model of the sweep.

    Attributes:
        name: short, for labels.
        identity: the digest that identifies its content.
        spelling: its name in a configuration's ``models``, valid in any folder: alias, hub id or absolute path.
        content: how ``identity`` is computed from its files.
        is_here: whether all of it is on this machine; otherwise ``checkpoint`` is a stand-in.
        has_known_shape: whether the shape of ``checkpoint`` is the model's own.
    """

    name: str
    checkpoint: Checkpoint
    identity: str
    spelling: str
    content: Content
    is_here: bool = True
    has_known_shape: bool = True


def resolve_models(
    config: SweepConfig, shipped: Path, hashes: FileHashes, download: bool, stands_in: bool = False
) -> list[ModelSource]:
    """Find the folder and identity of every model of the sweep.

    Args:
        shipped: folder with the alias files that come with the project.
        download: fetch hub models that are not in the local cache.
        stands_in: take stand-ins for such models if they aren't fetched; otherwise they are errors.

    Raises:
        UserError: for an unknown alias or a damaged checkpoint.
    """
    aliases: dict[str, ModelAlias | Path] = {**shipped_aliases(shipped), **config.aliases}
    from_hub = partial(_hub_model, download=download, stands_in=stands_in)
    sources = [_resolve(name, aliases, hashes, from_hub) for name in config.models]
    _refuse_twice(sources)
    return sources


def _refuse_twice(sources: Sequence[ModelSource]) -> None:
    for one, other in combinations(sources, 2):
        if one.checkpoint.path.resolve() == other.checkpoint.path.resolve():
            raise UserError(
                f"--models: {one.spelling!r} and {other.spelling!r} are the same checkpoint; name it once "
                f"({one.checkpoint.path})"
            )
        if one.name == other.name:
            raise UserError(f"--models: two models are called {one.name!r}; give one of them an alias")


def shipped_aliases(folder: Path) -> dict[str, Path]:
    """Alias -> its file, ``<alias>.yaml``; only those that are used are read."""
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_alias(file: Path) -> ModelAlias:
    """Read an alias file, which has a hub_id or a path.

    Raises:
        UserError: for a file that can't be read as one.
    """
    return parse(ModelAlias, read_yaml(file, "alias", "the keys of an alias"), str(file))


def _resolve(
    name: str, aliases: Mapping[str, ModelAlias | Path], hashes: FileHashes, from_hub: Callable[..., ModelSource]
) -> ModelSource:
    alias = aliases.get(name)
    if isinstance(alias, Path):
        alias = read_alias(alias)
    if alias is None:
        folder = Path(name)
        if folder.is_file():
            raise UserError(f"--models: {name} is a file; give the folder of a Hugging Face checkpoint")
        if not folder.is_dir() and is_hub_id(name):
            hub_id, _, revision = name.partition("@")
            try:
                return from_hub(name.split("/", 1)[1], hub_id, revision or "main", name)
            except UserError as error:
                raise UserError(f"{error}; nor is there a folder {name}") from None
        if not (folder.is_dir() or os.sep in name):
            raise UserError(
                f"--models: unknown model {name!r}{did_you_mean(name, aliases)}; valid: {', '.join(sorted(aliases))}, "
                "the folder of a Hugging Face checkpoint, or a hub id (org/name)"
            )
        spelling = absolute_path(name, Path.cwd())
        return _local(Path(spelling).name, Path(spelling).resolve(), hashes, spelling)
    if alias.path is not None:
        return _local(name, Path(alias.path), hashes, name)
    assert alias.hub_id is not None
    return from_hub(name, alias.hub_id, alias.revision, name)


def _hub_model(name: str, hub_id: str, revision: str, spelling: str, *, download: bool, stands_in: bool) -> ModelSource:
    folder, is_known = _snapshot(name, hub_id, revision, download, optional=stands_in), True
    is_here = folder is not None
    if folder is None:
        folder, is_known = stand_in(name, hub_id, revision)
    checkpoint = open_checkpoint(folder)
    # The last part of a snapshot's folder is the commit that the revision stood for.
    identity = digest_of([hub_id, checkpoint.path.name])
    return ModelSource(name, checkpoint, identity, spelling, "commit", is_here, is_known)


def _local(name: str, folder: Path, hashes: FileHashes, spelling: str) -> ModelSource:
    checkpoint = open_checkpoint(folder)
    identity = hashes.of_files(folder, content_files(checkpoint))
    return ModelSource(name, checkpoint, identity, spelling, "checkpoint")


def _snapshot(name: str, hub_id: str, revision: str, download: bool, optional: bool) -> Path | None:
    """The folder of a model in the hub's cache; None if it is ``optional`` and not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
    patterns += ["tokenization_*.py", *LICENCE_PATTERNS]
    # Mistral's models hold all weights twice, once more in their publisher's own format.
    twice = ["consolidated*.safetensors"]
    try:
        found = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=twice,
            local_files_only=not download,
        )
    except LocalEntryNotFoundError:
        if optional:
            return None
        action = "check the network" if download else "it is downloaded when the sweep runs without --dry-run"
        raise UserError(f"model {name!r}: {hub_id}@{revision} is not in the local hub cache; {action}") from None
    except hub_errors() as error:
        raise UserError(
            f"model {name!r}: {hub_id}@{revision} can't be downloaded: {error}; for a gated model, accept its licence "
            "on its page and run `hf auth login`"
        ) from None
    return Path(found)

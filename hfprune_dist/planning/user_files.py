"""The user's files that a stage reads: how their content identifies them, and that it stays as it was planned."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from hfprune_dist.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hfprune_dist.data.text import identity_of
from hfprune_dist.errors import UserError
from hfprune_dist.store.hashing import FileHashes, digest_of, files_below
from hfprune_dist.store.stage import Input


class ChangedInputError(UserError):
    """A file is not the one that the sweep was planned with, so results may come from either version."""


def require_planned(inputs: Iterable[Input], hashes: FileHashes, when: str) -> None:
    """Refuse files of the user's, among a stage's inputs, that have other content than was planned (ChangedInputError)
    or are gone; those of a commit on the hub never change. Files that were hashed before and look untouched aren't read
    again. ``when`` says, for the message, during what they changed.
    """
    for source in inputs:
        location = Path(source.location)
        if source.content == "commit":
            open_checkpoint(location)
        elif source.content and _identity(source.content, location, hashes) != source.identity:
            raise ChangedInputError(f"{location}: changed {when}; run the sweep again")
    with contextlib.suppress(OSError):  # then files are read again the next time
        hashes.save()


def content_files(checkpoint: Checkpoint) -> list[str]:
    """Names of the files that identify a local checkpoint."""
    return checkpoint.weight_files + checkpoint.companion_files


def own_tasks(include_path: str | None, hashes: FileHashes) -> dict[str, Input]:
    """The user's lm-eval tasks as input of an evaluation: their folder, with the files elsewhere that they read; raises
    UserError if there is no such folder, or a file can't be read.
    """
    if include_path is None:
        return {}
    return {"tasks": Input(_identity("tasks", Path(include_path), hashes), include_path, content="tasks")}


def _identity(content: str, location: Path, hashes: FileHashes) -> str:
    if content == "text":
        return identity_of(location, hashes)
    if content == "checkpoint":
        return hashes.of_files(location, content_files(open_checkpoint(location)))
    inside = hashes.of_folder(location)
    # The order of their paths tells files of one name apart.
    return digest_of([inside, [[file.name, hashes.of_file(file)] for file in outside_files(location)]])


def outside_files(folder: Path) -> list[Path]:
    """The files outside a folder of lm-eval tasks that its YAML files name, or that files so named name: settings that
    they include, and data, of a folder all of it; links resolved, and sorted.

    Any text in them that is the path of a file or of a folder counts, but no patterns; what functions read isn't known.
    Tasks that can't be read are passed over: where they are evaluated, they are refused. A folder that can't be listed
    is a UserError.
    """
    inside = {(folder / name).resolve() for name in files_below(folder)}
    found = [file.resolve() for file in sorted(folder.glob("**/*.yaml"))]
    for file in found:  # grows while files name others
        if file.suffix in (".yaml", ".yml"):
            found += [named for named in map(Path.resolve, _named_in(file, folder)) if named not in found]
    return sorted(set(found) - inside)


def _named_in(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the files that a YAML file names, as seen from its own folder or from the tasks'."""
    names: list[str] = []
    with contextlib.suppress(yaml.YAMLError, ValueError, OSError):
        tokens = yaml.scan(file.read_text(encoding="utf-8"))
        names += [token.value for token in tokens if isinstance(token, yaml.ScalarToken) and token.value]
    around = {folder.resolve(), *folder.resolve().parents}
    for place in (above / name for name in names for above in (file.parent, folder)):
        if os.path.isfile(place):  # noqa: PTH113  of a text that may be no path at all
            yield place
        elif os.path.isdir(place) and place.resolve() not in around:  # noqa: PTH112
            yield from (place / name for name in files_below(place))

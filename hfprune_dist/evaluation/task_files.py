"""The files that lm-eval tasks in a folder read: YAML files that they include, modules of their functions, and data.

What the functions themselves read isn't known.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hfprune_dist.errors import UserError
from hfprune_dist.evaluation.task_definitions import merged_with_included
from hfprune_dist.store.hashing import files_below

# Loaders of the datasets library that read local files.
FILE_LOADERS = ("arrow", "csv", "json", "parquet", "text")
_FUNCTION = re.compile(r"!function\s+[\"']?([\w.]+)\.\w+")


def outside_files(folder: Path) -> list[Path]:
    """The files that tasks in a folder read, and that ``files_below`` doesn't list there; links resolved, and sorted.

    Files that are missing, and tasks that can't be read, are passed over: where they are evaluated, they are refused.

    Raises:
        UserError: if the folder, or one with data, can't be listed.
    """
    inside = {(folder / name).resolve() for name in files_below(folder)}
    try:
        read = {it.resolve() for file in sorted(folder.glob("**/*.yaml")) for it in _read_by(file, folder)}
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    return sorted(read - inside)


def _read_by(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the files that a task or group in a folder reads in addition to its own YAML file."""
    try:
        content, sources = merged_with_included(file)
    except (UserError, yaml.YAMLError, OSError, ValueError, TypeError):
        return
    yield from sources[1:]
    for source in sources:
        yield from _modules_of(source.resolve())
    for settings in _all_settings(content):
        yield from _local_data(settings, folder)


def _modules_of(source: Path) -> Iterator[Path]:
    """Yield the modules that a YAML file names and that lie beside it; others are installed packages."""
    for module in dict.fromkeys(_FUNCTION.findall(source.read_text(encoding="utf-8"))):
        file = source.parent / f"{module.replace('.', '/')}.py"
        if file.is_file():
            yield file


def _all_settings(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of a task or group, and those that the group has for its members."""
    yield content
    members = content.get("task")
    for member in members if isinstance(members, list) else ():
        if isinstance(member, Mapping):
            yield from _all_settings(member)


def _local_data(settings: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Yield the local files of a task's data."""
    options = _options_of(settings)
    place = data_folder(settings, folder)
    patterns = list(paths_in(options.get("data_files")))
    for pattern in patterns:
        _, _, innermost = pattern.rpartition("::")  # as in zip://*.json::archive.zip
        local = innermost.removeprefix("file://")
        if "://" not in local:
            yield from matching(place / local)
    named = place != folder and place.is_dir()
    if named and not patterns:  # the library looks for files by itself
        yield from (place / name for name in files_below(place))


def data_folder(settings: Mapping[str, Any], folder: Path) -> Path:
    """The folder that relative paths in a task's ``data_files`` refer to.

    The datasets library takes the current one, which is ``folder`` while a task is loaded, or the local data set that
    ``dataset_path`` is; in it, ``data_dir`` if there is one.
    """
    path, below = settings.get("dataset_path"), _options_of(settings).get("data_dir")
    if isinstance(path, str) and path not in FILE_LOADERS and (folder / path).is_dir():
        folder = folder / path
    return (folder / Path(below).expanduser()) if isinstance(below, str) else folder


def _options_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    options = settings.get("dataset_kwargs")
    return options if isinstance(options, Mapping) else {}


def paths_in(data_files: Any) -> Iterator[str]:
    """Yield the paths in ``data_files``: a single one, several, or those of each split."""
    if isinstance(data_files, str):
        yield data_files
    elif isinstance(data_files, Mapping | list):
        for entry in data_files.values() if isinstance(data_files, Mapping) else data_files:
            yield from paths_in(entry)


def matching(pattern: Path) -> list[Path]:
    """The file with this name, or the files that match it as a pattern."""
    names = [str(pattern)] if pattern.is_file() else glob.glob(str(pattern), recursive=True)  # noqa: PTH207
    return [file for file in map(Path, names) if file.is_file()]

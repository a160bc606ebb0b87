"""The files that lm-eval tasks in a folder read elsewhere: YAML files that they include, functions, and data.

Any text in a task's YAML file that is the path of a file counts. What functions read isn't known.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from hfprune_dist.errors import UserError
from hfprune_dist.store.hashing import files_below

_FUNCTION = re.compile(r"!function\s+[\"']?([\w.]+)\.\w+")


class _TaskYaml(yaml.SafeLoader):
    """YAML loader that keeps lm-eval's ``!function module.name`` as text, without importing anything."""


_TaskYaml.add_multi_constructor("!function", lambda loader, suffix, node: f"!function {node.value}")


def outside_files(folder: Path) -> list[Path]:
    """The files that tasks in a folder read, and that ``files_below`` doesn't list there; links resolved, and sorted.

    Files that are missing, and tasks that can't be read, are passed over: where they are evaluated, they are refused.

    Raises:
        UserError: if the folder, or one with data, can't be listed.
    """
    inside = {(folder / name).resolve() for name in files_below(folder)}
    try:
        read = [file.resolve() for file in sorted(folder.glob("**/*.yaml"))]
        for file in read:  # grows while files include others
            read += [found for found in map(Path.resolve, _read_by(file, folder)) if found not in read]
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    return sorted(set(read) - inside)


def _read_by(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the files that one file names, if it is YAML: modules beside it, and paths as lm-eval and datasets see
    them, from its own folder, from the tasks' or from a folder that it names.
    """
    if file.suffix not in (".yaml", ".yml"):
        return
    try:
        text = file.read_text(encoding="utf-8")
        paths = list(_paths_in(yaml.load(text, _TaskYaml)))
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    modules = (file.parent / f"{module.replace('.', '/')}.py" for module in _FUNCTION.findall(text))
    yield from (module for module in modules if module.is_file())
    data = [folder / path for path in paths if _is_elsewhere(folder / path, folder)]
    data += [inner / path for inner in data for path in paths if _is_elsewhere(inner / path, folder)]
    for place in (file.parent, folder):
        for path in paths:
            yield from _matching(place / path)
    for place in data:
        found = [match for path in paths for match in _matching(place / path)]
        yield from found or (place / name for name in files_below(place))


def _paths_in(content: Any) -> Iterator[str]:
    """Yield all values that may be paths, at any depth, without the forms of URLs that local files have too."""
    if isinstance(content, str) and content and all(len(part.encode()) < 256 for part in content.split("/")):
        path = content.rpartition("::")[2].removeprefix("file://")  # as in zip://*.json::archive.zip
        if "://" not in path and "\0" not in path:
            yield path
    elif isinstance(content, Mapping | list):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from _paths_in(value)


def _is_elsewhere(place: Path, folder: Path) -> bool:
    return place.is_dir() and place.resolve() not in (folder.resolve(), *folder.resolve().parents)


def _matching(pattern: Path) -> list[Path]:
    """The file with this name, or the files that match it as a pattern."""
    names = [str(pattern)] if pattern.is_file() else glob.glob(str(pattern), recursive=True)  # noqa: PTH207
    return [file for file in map(Path, names) if file.is_file()]

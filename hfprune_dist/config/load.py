"""Build a configuration from files and flags: defaults <- YAML files <- command line; unknown keys are refused."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hfprune_dist.config.explain import explain
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import IS_PATH, Section, without_null
from hfprune_dist.config.yaml_text import NotYamlError, read_yaml, yaml_value
from hfprune_dist.errors import UserError

PARTS_OF_A_DATA_SET = ("name", "split", "revision")
# Folder of the project's own configurations.
SHIPPED = "configs"


def load_config(files: Sequence[Path], overrides: Mapping[str, Any], shipped: Path | None = None) -> SweepConfig:
    """Merge defaults, YAML files in order, and dotted command-line overrides into a checked configuration.

    Args:
        files: YAML files; later ones win, sections are merged key by key.
        overrides: dotted key -> value, e.g. ``{"calibration.samples": 16}``; wins over every file.
        shipped: the folder of the project's own configurations. A file named ``configs/...`` that doesn't exist is
            taken from there; its relative paths are resolved as if it existed where it was named.

    Raises:
        UserError: for an unreadable file, an unknown key, a wrong type or a value out of range.
    """
    contents = [with_absolute_paths(_content_of(file, shipped), file.resolve().parent) for file in files]
    merged: dict[str, Any] = {}
    for content in (*contents, from_command_line(overrides)):
        merged = _merge(merged, content)
    return parse(SweepConfig, merged, ", ".join([*map(str, files), *(["command line"] if overrides else [])]))


def from_command_line(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as sections and keys, in which paths are absolute, as seen from the current folder."""
    content: dict[str, Any] = {}
    for key, value in overrides.items():
        _set_dotted(content, key, value)
    return with_absolute_paths(content, Path.cwd()) if content else {}


def _content_of(file: Path, shipped: Path | None) -> dict[str, Any]:
    if shipped is not None and file.parts[:1] == (SHIPPED,) and not file.exists():
        own = shipped.joinpath(*file.parts[1:])
        file = own if own.is_file() else file
    return read_yaml(file, "--config", "keys and values at the top level")


SectionT = typing.TypeVar("SectionT", bound=Section)


def parse(schema: type[SectionT], raw: Mapping[str, Any], where: str) -> SectionT:
    """Check ``raw`` against ``schema``; every problem becomes a line of one ``UserError``."""
    try:
        return schema.model_validate(dict(raw))
    except ValidationError as error:
        lines = [explain(schema, raw, problem) for problem in error.errors()]
        raise UserError(f"configuration ({where}):\n" + "\n".join(f"  {line}" for line in lines)) from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Merge ``--set key=value`` arguments as files are merged: key by key, and later ones win; values are YAML.

    Returns:
        keys of the top level, whose values may be sections.
    """
    merged: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise UserError(f"--set {assignment!r}: write it as key=value, e.g. --set calibration.samples=64")
        try:
            _set_dotted(merged, key.strip(), yaml_value(text))
        except NotYamlError as error:
            raise UserError(f"--set {key}: {text!r} is not a YAML value ({error})") from None
    return merged


def parse_list(flag: str, text: str) -> list[str]:
    """Split a comma-separated flag; an empty list or item is refused."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise UserError(f"{flag} {text!r}: give one or more values separated by commas, without empty ones")
    return items


def parse_ratios(text: str) -> list[float]:
    """Read ``--ratios 0.2,0.5``."""
    try:
        return [float(item) for item in parse_list("--ratios", text)]
    except ValueError:
        raise UserError(f"--ratios {text!r}: give numbers between 0 and 1, e.g. --ratios 0.2,0.5") from None


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    if base.get("dataset") is not None and update.get("dataset") not in (None, base["dataset"]):
        for part in PARTS_OF_A_DATA_SET:  # of the one that is replaced
            merged.pop(part, None)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _set_dotted(target: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {key}: {parent!r} is already set to a value, it can't hold keys")
    target |= _merge(target, {leaf: value})


def with_absolute_paths(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    """A configuration whose relative paths, which are relative to ``base``, are absolute."""
    resolved: dict[str, Any] = _with_absolute_paths(SweepConfig, raw, base)
    for key, is_path in (("methods", _is_file), ("models", _is_folder)):
        if isinstance(names := raw.get(key), list):
            resolved[key] = [absolute_path(name, base) if is_path(name, base) else name for name in names]
    return resolved


def _with_absolute_paths(annotation: Any, value: Any, base: Path) -> Any:
    """A value of this type, in which keys that are marked as paths have absolute ones."""
    annotation = without_null(annotation)
    kind = typing.get_origin(annotation)
    if kind is dict and isinstance(value, dict):
        return {key: _with_absolute_paths(typing.get_args(annotation)[1], part, base) for key, part in value.items()}
    if kind is list and isinstance(value, list):
        return [_with_absolute_paths(typing.get_args(annotation)[0], part, base) for part in value]
    if not (isinstance(annotation, type) and issubclass(annotation, Section) and isinstance(value, dict)):
        return value
    resolved = dict(value)
    for key, field in annotation.model_fields.items():
        if IS_PATH in field.metadata and isinstance(value.get(key), str) and value[key]:  # empty ones are refused
            resolved[key] = absolute_path(value[key], base)
        elif key in value:
            resolved[key] = _with_absolute_paths(field.annotation, value[key], base)
    return resolved


def _is_file(method: Any, _base: Path) -> bool:
    """Whether a method is named by its file."""
    return isinstance(method, str) and method.endswith((".yaml", ".yml"))


def _is_folder(model: Any, base: Path) -> bool:
    """Whether a model is named by its folder: with a slash, and unless it has the form of a hub id, if there is one."""
    is_path = isinstance(model, str) and "/" in model
    return is_path and (not is_hub_id(model) or Path(absolute_path(model, base)).is_dir())


def is_hub_id(model: str) -> bool:
    """Whether a model's name has the form of an id on the Hugging Face hub: org/name or org/name@revision."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", model, re.ASCII) is not None


def absolute_path(path: str, base: Path) -> str:
    """The absolute form of a path that is relative to ``base`` or begins with ``~``. Links aren't followed: tables call
    a model or a method by the name that it was given.

    Raises:
        UserError: if there is none, or if it isn't UTF-8, which logs, tables and cards that name it are.
    """
    try:
        found = os.path.normpath(base / Path(path).expanduser())
        found.encode()
    except (RuntimeError, UnicodeEncodeError) as error:  # an unknown user's home
        raise UserError(f"{path!r}: not a valid path ({error})") from None
    if "\0" in found:
        raise UserError(f"{path!r}: not a valid path (it has a null byte)")
    return found

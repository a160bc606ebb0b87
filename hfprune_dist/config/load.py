"""Build a configuration from files and flags: defaults <- YAML files <- command line; what is wrong is explained."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hfprune_dist.config.method import EngineName
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.section import DATA_SET_KEYS, Section, as_written, without_null
from hfprune_dist.config.yaml_text import NotYamlError, read_yaml, yaml_value
from hfprune_dist.errors import UserError, did_you_mean

# Keys that are paths, in any section.
PATHS = "path", "include_path"
# Folder of the project's own configurations.
SHIPPED = "configs"


def load_config(files: Sequence[Path], overrides: Mapping[str, Any], shipped: Path | None = None) -> SweepConfig:
    """Merge defaults, YAML files in order, and dotted command-line overrides into a checked configuration; raises
    UserError for an unreadable file, an unknown key, a wrong type or a value out of range.

    Args:
        files: YAML files; later ones win, sections are merged key by key.
        overrides: dotted key -> value, e.g. ``{"calibration.samples": 16}``; wins over every file.
        shipped: the folder of the project's own configurations. A file named ``configs/...`` that doesn't exist is
            taken from there; its relative paths are resolved as if it existed where it was named.
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
        content = _merge(content, _nested(key, value))
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
        lines = [_explain(schema, raw, problem) for problem in error.errors()]
        raise UserError(f"configuration ({where}):\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(schema: type[BaseModel], raw: Mapping[str, Any], problem: Mapping[str, Any]) -> str:
    """Turn an entry of ``ValidationError.errors`` into a line that says which key has it, and what is valid there."""
    location = _as_given(raw, problem["loc"])
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        valid = sorted(_fields_at(schema, location[:-1]))
        return f"unknown key {key!r}{did_you_mean(location[-1], valid)}; valid keys: {', '.join(valid)}"
    if not key or problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    message = re.sub("^(Input|String|List) should ", "must ", problem["msg"])
    message = re.sub("a valid dictionary( or instance of .*)?", "a section", message)
    message = message.replace("a valid integer", "a whole number").replace(" after validation", "")
    return f"{key}: {message} (got {as_written(problem['input'])})"


def _as_given(raw: Any, location: Iterable[Any]) -> list[str]:
    """The part of a location that ``raw`` has; pydantic adds the member of a union and the like."""
    found = []
    for part in location:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            break
        found.append(str(part))
    return found


def _fields_at(schema: type[BaseModel], location: Iterable[str]) -> list[str]:
    """The valid keys of the section that ``location`` leads to; none if that is no section."""
    annotation: Any = schema
    for part in location:
        annotation = without_null(annotation)
        if typing.get_origin(annotation) in (dict, list):
            annotation = typing.get_args(annotation)[-1]
        elif issubclass(annotation, BaseModel) and part in annotation.model_fields:
            annotation = annotation.model_fields[part].annotation
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return list(annotation.model_fields) if is_section else []


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Merge ``--set key=value`` arguments, whose values are YAML, as files are: key by key, and later ones win."""
    merged: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise UserError(f"--set {assignment!r}: write it as key=value, e.g. --set calibration.samples=64")
        try:
            merged = _merge(merged, _nested(key.strip(), yaml_value(text)))
        except NotYamlError as error:
            raise UserError(f"--set {key}: {text!r} is not a YAML value ({error})") from None
    return merged


def _merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """Sections key by key; a text's path or data set replaces the one, with its keys, that it had before."""
    replaced: tuple[str, ...] = ()
    if update.get("path", base.get("path")) != base.get("path") and "dataset" not in update:
        replaced = ("dataset", *DATA_SET_KEYS)
    elif "dataset" in base and update.get("dataset") not in (None, base["dataset"]):
        replaced = DATA_SET_KEYS
    if update.get("dataset") is not None and "path" not in update:
        replaced = ("path", *replaced)
    merged = {key: value for key, value in base.items() if key not in replaced}
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _nested(key: str, value: Any) -> dict[str, Any]:
    """A value in the sections that its dotted key names."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def with_absolute_paths(value: Any, base: Path, key: str = "") -> Any:
    """A configuration, or the value of a key in it, whose relative paths, which are relative to ``base``, are absolute:
    in the keys that are paths, Pythons with a slash (others are in PATH), models with a slash, unless they have the
    form of a hub id and are no folder, and methods that are named by a file.
    """
    if isinstance(value, dict):
        return {name: with_absolute_paths(part, base, name) for name, part in value.items()}
    if isinstance(value, list):
        return [with_absolute_paths(part, base, key) for part in value]
    return absolute_path(value, base) if isinstance(value, str) and _is_path(key, value, base) else value


def _is_path(key: str, text: str, base: Path) -> bool:
    if key == "methods":
        return text.endswith((".yaml", ".yml"))
    if key == "models":
        return "/" in text and (not is_hub_id(text) or Path(absolute_path(text, base)).is_dir())
    return text != "" and (key in PATHS or (key in typing.get_args(EngineName) and "/" in text))


def is_hub_id(model: str) -> bool:
    """Whether a model's name has the form of an id on the Hugging Face hub: org/name or org/name@revision."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", model, re.ASCII) is not None


def absolute_path(path: str, base: Path) -> str:
    """The absolute form of a path that is relative to ``base`` or begins with ``~``. Links aren't followed: tables show
    the name that was given. One that isn't UTF-8, as the files that name it are, is refused.
    """
    found = os.path.normpath(base / os.path.expanduser(path))  # noqa: PTH111  which leaves an unknown user's home
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path!r}: not a valid path ({error})") from None
    return found

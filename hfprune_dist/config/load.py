"""Build a configuration from files and flags: defaults <- YAML files <- command line; unknown keys are refused."""

from __future__ import annotations

import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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


@dataclass(frozen=True)
class Layer:
    """One of the sources that a configuration is merged from.

    Attributes:
        source: name of the source: a file, as the user named it, or the command line.
        content: keys and values; paths are absolute.
    """

    source: str
    content: Mapping[str, Any]


def load_config(files: Sequence[Path], overrides: Mapping[str, Any], shipped: Path | None = None) -> SweepConfig:
    """Merge defaults, YAML files in order, and dotted command-line overrides into a checked configuration.

    Args:
        files: YAML files; later ones win, sections are merged key by key.
        overrides: dotted key -> value, e.g. ``{"calibration.samples": 16}``; wins over every file.
        shipped: see ``read_layers``.

    Raises:
        UserError: for an unreadable file, an unknown key, a wrong type or a value out of range.
    """
    return merge_layers(read_layers(files, overrides, shipped))


def read_layers(files: Sequence[Path], overrides: Mapping[str, Any], shipped: Path | None = None) -> list[Layer]:
    """The layers that a configuration is merged from; later ones win.

    Args:
        shipped: the folder of the project's own configurations. A file named ``configs/...`` that doesn't exist is
            taken from there; its relative paths are resolved as if it existed where it was named.

    Raises:
        UserError: for an unreadable file.
    """
    contents = [_content_of(file, shipped) for file in files]
    command_line: dict[str, Any] = {}
    for key, value in overrides.items():
        _set_dotted(command_line, key, value)
    aliases = _aliases_in([*contents, command_line], shipped)
    layers = [
        Layer(str(file), _resolve_paths(content, file.resolve().parent, aliases))
        for file, content in zip(files, contents, strict=True)
    ]
    if overrides:
        layers.append(Layer("command line", _resolve_paths(command_line, Path.cwd(), aliases)))
    return layers


def merge_layers(layers: Sequence[Layer]) -> SweepConfig:
    """Merge defaults and layers into a checked configuration.

    Raises:
        UserError: for an unknown key, a wrong type or a value out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer.content)
    return parse(SweepConfig, merged, ", ".join(layer.source for layer in layers) or "defaults")


def _content_of(file: Path, shipped: Path | None) -> dict[str, Any]:
    if shipped is not None and file.parts[:1] == (SHIPPED,) and not file.exists():
        own = shipped.joinpath(*file.parts[1:])
        file = own if own.is_file() else file
    return read_yaml(file, "--config", "keys and values at the top level")


def _aliases_in(contents: Iterable[Mapping[str, Any]], shipped: Path | None) -> set[str]:
    """Names that stand for models, of the project's and of all layers."""
    sections = [content.get("aliases") for content in contents]
    own = {str(name) for section in sections if isinstance(section, dict) for name in section}
    return own if shipped is None else own.union(file.stem for file in (shipped / "models").glob("*.yaml"))


SectionT = typing.TypeVar("SectionT", bound=Section)


def parse(schema: type[SectionT], raw: Mapping[str, Any], where: str) -> SectionT:
    """Check ``raw`` against ``schema``; every problem becomes a line of one ``UserError``."""
    try:
        return schema.model_validate(dict(raw))
    except ValidationError as error:
        lines = [explain(schema, problem) for problem in error.errors()]
        raise UserError(f"configuration ({where}):\n" + "\n".join(f"  {line}" for line in lines)) from None


def parse_assignment(assignment: str) -> tuple[str, Any]:
    """Split a ``--set key=value`` argument; the value is read as YAML."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise UserError(f"--set {assignment!r}: write it as key=value, e.g. --set calibration.samples=64")
    try:
        return key.strip(), yaml_value(text)
    except NotYamlError as error:
        raise UserError(f"--set {key}: {text!r} is not a YAML value ({error})") from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Merge ``--set key=value`` arguments as files are merged: key by key, and later ones win.

    Returns:
        keys of the top level, whose values may be sections.
    """
    merged: dict[str, Any] = {}
    for assignment in assignments:
        _set_dotted(merged, *parse_assignment(assignment))
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
        percent = "; 20% is 0.2" if "%" in text else ""
        raise UserError(f"--ratios {text!r}: give numbers between 0 and 1, e.g. --ratios 0.2,0.5{percent}") from None


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
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {key}: {parent!r} is already set to a value, it can't hold keys")
        target = child
    old = target.get(leaf)
    target[leaf] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value


def _resolve_paths(raw: dict[str, Any], base: Path, aliases: Collection[str]) -> dict[str, Any]:
    """Make the relative paths in ``raw`` absolute; they are relative to ``base``."""
    resolved: dict[str, Any] = _with_absolute_paths(SweepConfig, raw, base)
    for key, is_path in (("methods", _is_file), ("models", partial(_is_folder, base=base, aliases=aliases))):
        names = raw.get(key)
        if isinstance(names, list):
            resolved[key] = [named_path(name, base) if is_path(name) else name for name in names]
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


def _is_file(method: Any) -> bool:
    return isinstance(method, str) and method.endswith((".yaml", ".yml"))


def _is_folder(model: Any, base: Path, aliases: Collection[str]) -> bool:
    """Whether a model is named by its folder. A name without a slash is if it is no alias and a checkpoint has it; one
    that could be a hub id is if there is such a folder.
    """
    if not isinstance(model, str) or model in {"", *aliases}:  # empty ones are refused
        return False
    if "/" not in model:
        return (base / model / "config.json").is_file()
    return not is_hub_id(model) or Path(absolute_path(model, base)).is_dir()


def is_hub_id(model: str) -> bool:
    """Whether a model's name has the form of an id on the Hugging Face hub: org/name or org/name@revision."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", model, re.ASCII) is not None


def named_path(path: str, base: Path) -> str:
    """As ``absolute_path``, but a link isn't followed: tables call a model or a method by the name that it was given.

    Raises:
        UserError: as ``absolute_path``.
    """
    followed, given = absolute_path(path, base), Path(path).expanduser()
    if given.name in {"", ".."}:
        return followed
    return _encodable(Path(absolute_path(str(given.parent), base)) / given.name)


def absolute_path(path: str, base: Path) -> str:
    """The absolute form of a path that is relative to ``base`` or begins with ``~``.

    Raises:
        UserError: if there is none, or if it isn't UTF-8, which logs, tables and cards that name it are.
    """
    try:
        found = (base / Path(path).expanduser()).resolve()
    except (ValueError, RuntimeError, OSError) as error:  # a NUL byte, a loop of links
        raise UserError(f"{path!r}: not a valid path ({error})") from None
    return _encodable(found)


def _encodable(path: Path) -> str:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!r}: this path isn't UTF-8; rename the file or folder") from None
    return str(path)

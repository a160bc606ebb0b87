"""YAML as configurations are written in: text to values, and values to text that reads back as the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from hfprune_dist.config.section import as_written
from hfprune_dist.errors import UserError


class NotYamlError(ValueError):
    """A text isn't valid YAML; the message says where and why."""


class _Loader(yaml.SafeLoader):
    """Reads 5e-4 as a number, which is a string in PyYAML's YAML 1.1, and refuses a key that is repeated."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a section; what it merges (``<<``) stands in it only later, and may repeat its keys."""
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {name!r} appears twice", problem_mark=key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text that the loader would read as a number."""


for _class in (_Loader, _Dumper):
    # A number whose exponent has no sign stays text, since 4e51234 may be the hash of a revision.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]\d+$"), list("-+0123456789")
    )


def yaml_value(text: str) -> Any:
    """The value of a text; a NotYamlError if it isn't valid."""
    try:
        value = yaml.load(text, _Loader)
        json.dumps(value, default=str, ensure_ascii=False).encode()  # neither in itself nor beyond any file
        return value
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise NotYamlError(str(error).replace('in "<unicode string>", ', "")) from None


def read_yaml(file: Path, flag: str, expected: str) -> dict[str, Any]:
    """A YAML file's keys and values; a refusal names it by the option ``flag``, and tells what was ``expected``."""
    try:
        raw = yaml_value(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror or error}") from None
    except ValueError as error:  # not UTF-8, or not YAML
        raise UserError(f"{flag} {file}: not valid YAML: {error}") from None
    if not isinstance(raw, dict | None):
        found = "a list" if isinstance(raw, list) else as_written(raw)
        raise UserError(f"{flag} {file}: expected {expected}, found {found}")
    return raw or {}


def to_yaml(value: Any) -> str:
    """YAML that reads back as ``value``, whose keys keep their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return text

"""YAML as configurations are written in: text to values, and values to text that reads back as the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from hfprune_dist.config.explain import kind_of
from hfprune_dist.errors import UserError

# What YAML calls a text that it doesn't read from a file itself.
UNNAMED = "<unicode string>"


class NotYamlError(ValueError):
    """A text isn't valid YAML; the message says where and why."""


class _Loader(yaml.SafeLoader):
    """Loader that reads 5e-4 as a number; PyYAML follows YAML 1.1, where it is a string. A number whose exponent has no
    sign stays one, since 4e51234 may be the hash of a revision.

    So do 010 and 12:30, which YAML 1.1 reads in bases 8 and 60. A repeated key is an error; PyYAML drops the first.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping as it is written: later, what it merges (``<<``) stands in it too, and may repeat its keys.

        Raises:
            ComposerError: for a repeated key.
        """
        node = super().compose_mapping_node(anchor)
        names = [key.value for key, _ in node.value]
        for name, (key, _) in zip(names, node.value, strict=True):
            if names.count(name) > 1:
                raise ComposerError(None, None, f"the key {name!r} appears twice", key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node.

        Raises:
            ConstructorError: for text in the form of a type that isn't a valid value of it, such as 2024-13-45.
        """
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            raise ConstructorError(None, None, f"{node.value!r}: {error}", node.start_mark) from None


_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _INTEGER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text that the loader would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]\d+$"), list("-+0123456789")
    )


def yaml_value(text: str) -> Any:
    """The value of a text.

    Raises:
        NotYamlError: if it isn't valid.
    """
    try:
        value = yaml.load(text, _Loader)
        json.dumps(value, default=str, ensure_ascii=False).encode()  # neither in itself nor beyond any file
        return value
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise NotYamlError(str(error).replace(f'in "{UNNAMED}", ', "")) from None


def read_yaml(file: Path, flag: str, expected: str) -> dict[str, Any]:
    """The keys and values of a YAML file; none if it is empty.

    Args:
        flag: the option that names the file, for messages.
        expected: what the file should hold, for messages.

    Raises:
        UserError: if it can't be read, or holds something else.
    """
    try:
        raw = yaml_value(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {file}: not valid YAML: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except NotYamlError as error:
        raise UserError(f"{flag} {file}: not valid YAML: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{flag} {file}: expected {expected}, found {kind_of(raw)}")
    return raw


def to_yaml(value: Any, *, width: float = 80, flow: bool = False) -> str:
    """YAML that reads back as ``value``, whose keys keep their order.

    Args:
        width: of a line, beyond which values are continued on the next one.
        flow: whether sections and lists are written in brackets.
    """
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, width=width)
    return text

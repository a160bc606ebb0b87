"""A configuration written as YAML, with the source of each value as a comment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hfprune_dist.config.load import Layer
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.config.yaml_text import to_yaml

Key = tuple[str, ...]


def with_sources(config: SweepConfig, layers: Sequence[Layer]) -> str:
    """All keys of a configuration as YAML, which can be used as a configuration file.

    Args:
        layers: the layers it was merged from; a value given by one of them has its source as a comment.
    """
    sources = {key: layer.source for layer in layers for key, _ in _leaves(layer.content)}
    return "# A value without a comment is the default.\n" + "\n".join(_lines(config.model_dump(), sources)) + "\n"


def _leaves(section: Mapping[str, Any], above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield each key whose value has no keys of its own, together with the keys above it, and its value."""
    for name, value in section.items():
        key = (*above, str(name))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, key)
        else:
            yield key, value


def _lines(section: Mapping[str, Any], sources: Mapping[Key, str]) -> Iterable[str]:
    open_sections: Key = ()
    for key, value in _leaves(section):
        *sections, name = key
        for depth, part in enumerate(sections):
            if open_sections[: depth + 1] != tuple(sections[: depth + 1]):
                yield f"{'  ' * depth}{_flow(part)}:"
        open_sections = tuple(sections)
        comment = f"  # {sources[key]}" if key in sources else ""
        yield f"{'  ' * len(sections)}{_flow(name)}: {_flow(value)}{comment}"


def _flow(value: Any) -> str:
    """A value on one line."""
    return to_yaml(value, width=math.inf, flow=True).removesuffix("...\n").rstrip("\n")

"""What is wrong with a configuration, in the words of whoever wrote it."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from hfprune_dist.config.section import as_written, without_null
from hfprune_dist.errors import did_you_mean


def explain(schema: type[BaseModel], raw: Mapping[str, Any], problem: Mapping[str, Any]) -> str:
    """Turn one of pydantic's problems into a line that says which key has it, and what is valid there.

    Args:
        schema: the class of the section that ``raw`` is read as.
        problem: an entry of ``ValidationError.errors``.
    """
    location = _as_given(raw, problem["loc"])
    if problem["type"] == "missing":
        location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        valid = sorted(_fields_at(schema, location[:-1]))
        return f"unknown key {key!r}{did_you_mean(location[-1], valid)}; valid keys: {', '.join(valid)}"
    if not key or problem["type"] in ("value_error", "missing"):
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    message = re.sub("^(Input|String|List) should ", "must ", problem["msg"])
    message = re.sub("a valid dictionary( or instance of .*)?", "a section", message)
    message = message.replace("a valid integer", "a whole number")
    if (valid := _fields_at(schema, location)) and not isinstance(problem["input"], Mapping):
        message += f" of the keys {', '.join(sorted(valid))}"
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

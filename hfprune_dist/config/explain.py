"""What is wrong with a configuration, in the words of whoever wrote it."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from hfprune_dist.config.section import as_written, without_null
from hfprune_dist.errors import did_you_mean


def explain(schema: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """Turn one of pydantic's problems into a line that says which key has it, and what is valid there.

    Args:
        schema: the class of the section that all of the configuration is read as.
        problem: an entry of ``ValidationError.errors``.
    """
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        valid = sorted(_fields_at(schema, location[:-1]))
        hint = did_you_mean(location[-1], valid)
        return f"unknown key {key!r}{hint}; valid keys: {', '.join(valid)}"
    if not key or "input" not in problem or problem["type"] in ("value_error", "missing"):
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    given = problem["input"]
    if problem["type"] in ("model_type", "model_attributes_type"):
        message = f"this is a section; give values to its keys, {', '.join(sorted(_fields_at(schema, location)))}"
    elif problem["type"] == "string_unicode":
        message = "this path isn't UTF-8; rename the file or folder"
    else:
        message = re.sub("^(Input|String|List) should ", "must ", problem["msg"])
        message = message.replace("a valid dictionary", "a section").replace("a valid integer", "a whole number")
        message = re.sub(r" after validation, not \d+$", "", message)
    return f"{key}: {message} (got {as_written(given)}){_hint(location[0], problem['type'], given)}"


def _hint(key: str, problem: str, given: Any) -> str:
    if key == "ratios" and problem == "less_than" and 2 <= given < 100:
        return f"; did you mean {given / 100:g}?"
    is_exponent = isinstance(given, str) and re.fullmatch(r"[-+.\d]+[eE]\d+", given)
    return "; YAML reads this as text, write it as in 1.0e+9" if is_exponent else ""


def kind_of(value: Any) -> str:
    """What a value read from YAML is, for messages."""
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else as_written(value)


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

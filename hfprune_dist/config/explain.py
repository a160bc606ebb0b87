"""What is wrong with a configuration, in the words of whoever wrote it: keys, sections, lists, text and numbers."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from hfprune_dist.config.section import as_written
from hfprune_dist.errors import did_you_mean

# Pydantic's name of a problem -> what to give instead, where its own message is about types of Python.
_WANTED = {
    "string_type": "give text, in quotes if it looks like something else",
    "string_unicode": "this path isn't UTF-8; rename the file or folder",
    "bool_type": "give true or false",
    "int_type": "give a whole number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
}


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
    return f"{key}: {_wanted(schema, location, problem)} (got {as_written(given)}){_hint(location, problem)}"


def kind_of(value: Any) -> str:
    """What a value read from YAML is, for messages."""
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else as_written(value)


def _wanted(schema: type[BaseModel], location: list[str], problem: Mapping[str, Any]) -> str:
    """What belongs at a key instead of what is there."""
    given = problem["input"]
    match problem["type"]:
        case "model_type" | "model_attributes_type":
            return f"this is a section; give values to its keys, {', '.join(sorted(_fields_at(schema, location)))}"
        case "dict_type":
            keys = ", ".join(sorted(_fields_at(schema, [*location, "any name"])))
            return f"give names, each with keys of its own: {keys}" if keys else "give names and their values"
        case "list_type":
            is_item = isinstance(given, str | int | float) and not isinstance(given, bool)
            return f"give a list: [{given}]" if is_item else "give a list"
        case kind if kind in _WANTED:
            return _WANTED[kind]
    message = re.sub("^(Input|String|List) should ", "must ", problem["msg"])
    return re.sub(r" after validation, not \d+$", "", message)


def _hint(location: list[str], problem: Mapping[str, Any]) -> str:
    given = problem["input"]
    if location[0] == "ratios" and problem["type"] == "less_than" and 2 <= given < 100:
        return f"; did you mean {given / 100:g}?"
    return _hint_on_numbers(given, whole=problem["type"] == "int_type")


def _hint_on_numbers(given: Any, whole: bool) -> str:
    """Hint for a string that looks like a number: YAML requires a decimal point and a signed exponent, with which a
    number isn't a whole one.
    """
    found = re.fullmatch(r"([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)", given) if isinstance(given, str) else None
    if found is None:
        return ""
    digits, fraction, sign, exponent = found.groups()
    if whole:
        number = float(given)
        return f"; write {number:.0f}" if number.is_integer() and abs(number) < 2**31 else ""
    return f"; YAML reads this as text, write {digits}{fraction or '.0'}e{sign or '+'}{exponent}"


def _fields_at(schema: type[BaseModel], location: Iterable[str]) -> list[str]:
    """The valid keys of the section that ``location`` leads to; none if that is no section."""
    annotation: Any = schema
    for part in location:
        if isinstance(annotation, types.UnionType):  # a section, or null
            annotation = typing.get_args(annotation)[0]
        if typing.get_origin(annotation) in (dict, list):
            annotation = typing.get_args(annotation)[-1]
        elif issubclass(annotation, BaseModel) and part in annotation.model_fields:
            annotation = annotation.model_fields[part].annotation
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return list(annotation.model_fields) if is_section else []

"""JSON schemas for editors: they accept what ships, and reject whatever the loader refuses because of its form."""

import json

import pytest
import yaml
from hfprune_launch import schema
from hfprune_launch.project import PROJECT
from sweeps import in_process

from hfprune_dist.config.yaml_text import read_yaml

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
SHIPPED = {
    "method": (PROJECT.configs / "methods").glob("*.yaml"),
    "model": (PROJECT.configs / "models").glob("*.yaml"),
    "profile": PROJECT.profiles.glob("*.yaml"),
    "sweep": [PROJECT.configs / "demo.yaml", *PROJECT.configs.glob("s*/*.yaml")],
}
FILES = [(kind, file) for kind, files in SHIPPED.items() for file in sorted(files)]
LIMITS = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minLength": lambda value, limit: len(value) >= limit,
    "minItems": lambda value, limit: len(value) >= limit,
}


@pytest.fixture(scope="module")
def schemas():
    return {kind: json.loads(in_process(schema.main, kind)[1]) for kind in schema.KINDS}


def is_valid(value, rule, root):
    """Decide as a validator of JSON schemas does, for the keywords that these schemas use."""
    if isinstance(rule, bool):
        return rule
    if "$ref" in rule:
        rule = {**root["$defs"][rule["$ref"].rpartition("/")[2]], **{k: v for k, v in rule.items() if k != "$ref"}}
    if "anyOf" in rule and not any(is_valid(value, each, root) for each in rule["anyOf"]):
        return False
    if "type" in rule and (
        not isinstance(value, TYPES[rule["type"]]) or (isinstance(value, bool) and rule["type"] != "boolean")
    ):
        return False
    if value not in rule.get("enum", [value]) or value != rule.get("const", value):
        return False
    if not all(holds(value, rule[name]) for name, holds in LIMITS.items() if name in rule):
        return False
    if isinstance(value, list):
        return all(is_valid(each, rule.get("items", {}), root) for each in value)
    if isinstance(value, dict):
        known, others = rule.get("properties", {}), rule.get("additionalProperties", True)
        if not set(rule.get("required", [])) <= set(value):
            return False
        return all(is_valid(each, known.get(name, others), root) for name, each in value.items())
    return True


@pytest.mark.parametrize(("kind", "file"), FILES, ids=lambda it: getattr(it, "stem", it))
def test_what_ships_satisfies_its_schema(kind, file, schemas):
    assert is_valid(read_yaml(file, "", ""), schemas[kind], schemas[kind])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sweep", "ratio: [0.2]"),
        ("sweep", "ratios: [20]"),
        ("sweep", "calibration: {samples: many}"),
        ("sweep", "calibration: {mixture: [{path: a, weigth: 2}]}"),
        ("sweep", "importance: {dtype: float16}"),
        ("method", "allocation: uniform"),
        ("method", "{criterion: entropy, multiple_of: some}"),
        ("method", "{criterion: entropy, multiple_of: 0}"),
        ("method", "{criterion: entropy, protect_first: 1.5}"),
        ("sweep", "prune: {protect_last: -1}"),
        ("sweep", "recovery: {micro_batch_size: 0}"),
        ("profile", "{time_minutes: 0}"),
        ("model", "hub: org/name"),
    ],
)
def test_mistakes_do_not(kind, text, schemas):
    assert not is_valid(yaml.safe_load(text), schemas[kind], schemas[kind])


def test_keys_are_explained(schemas):
    """An editor shows the text that stands below a field in the configuration's classes."""
    section = schemas["sweep"]["$defs"]["EvaluationConfig"]["properties"]
    assert section["batch_size"]["description"] == "Requests per forward pass of one rank."
    sections = [*schemas["sweep"]["$defs"].values(), *(schemas[kind] for kind in ("method", "profile", "model"))]
    keys = [(name, key) for section in sections for name, key in section["properties"].items() if "$ref" not in key]
    assert [name for name, key in keys if "description" not in key] == []

"""JSON schemas for editors: they know every key, explain it, and refuse others."""

import json

import pytest
from hfprune_launch import schema
from sweeps import in_process


@pytest.fixture(scope="module", params=schema.KINDS)
def sections(request):
    """The schema of a kind of file, and of each of its sections."""
    found = json.loads(in_process(schema.main, request.param)[1])
    assert found["$schema"].startswith("https://json-schema.org/") and found["properties"].keys() == {
        *schema.KINDS[request.param].model_fields
    }
    return [found, *found.get("$defs", {}).values()]


def test_keys_are_explained_and_others_refused(sections):
    """An editor shows the text that stands below a field in the configuration's classes."""
    for section in sections:
        assert section["additionalProperties"] is False
        keys = [name for name, key in section["properties"].items() if "$ref" not in key and "description" not in key]
        assert keys == []

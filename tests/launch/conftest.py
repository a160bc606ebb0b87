"""Fixtures of the commands' tests."""

import pytest
from sweeps import make_inputs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of small models and texts, made anew for each file of tests, which may change them."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))

"""Fixtures of the commands' tests."""

import pytest


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of small models and texts, made anew for each file of tests, which may change them."""
    from sweeps import make_inputs  # torch, which not all of these tests need, takes seconds

    return make_inputs(tmp_path_factory.mktemp("inputs"))

"""Fixtures of the commands' tests."""

import os
from contextlib import redirect_stdout, suppress

import pytest


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of small models and texts, made anew for each file of tests, which may change them."""
    from sweeps import make_inputs  # torch, which not all of these tests need, takes seconds

    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def unread():
    """A context in which output goes to a pipe whose reader has gone, as ``| head`` does once it has seen enough."""
    reading, writing = os.pipe()
    os.close(reading)
    with suppress(BrokenPipeError), os.fdopen(writing, "w", buffering=1) as stream:
        yield redirect_stdout(stream)

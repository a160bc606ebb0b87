"""Texts that are read from the hub."""

import sys
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError

from hfprune_dist.data.text import read_texts
from hfprune_dist.errors import UserError

SOURCE = {"dataset": "org/texts", "name": None, "split": "train", "revision": None}


@pytest.mark.parametrize("error", [*HfHubHTTPError.__bases__, RuntimeError])
def test_a_stream_that_breaks_off_is_an_error_of_the_user(monkeypatch, error):
    """Whichever library the hub's client uses: its errors need not be the operating system's."""

    def shuffle(**_):
        yield {"text": "the first"}
        raise error("the connection was reset")

    library = SimpleNamespace(load_dataset=lambda *_, **__: SimpleNamespace(shuffle=shuffle))
    monkeypatch.setitem(sys.modules, "datasets", library)
    texts = read_texts(SOURCE, None, ["text"], 0, "calibration")
    assert next(texts) == ("the first",)
    with pytest.raises(UserError, match=r"'org/texts' .*: the connection was reset; give a local file with path"):
        next(texts)

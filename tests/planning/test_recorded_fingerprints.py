"""No fingerprint changes by mistake: drawn configurations are planned today as they were when they were recorded."""

import json

import pytest
from planning.recording import RECORD, Drawing, fingerprints_of

from hfprune_dist.store.stage import STAGE_VERSIONS

RECORDED = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    return Drawing(tmp_path_factory.mktemp("drawing"))


@pytest.fixture(autouse=True)
def _versions_of_the_record(monkeypatch):
    for kind, version in RECORDED["versions"].items():
        monkeypatch.setitem(STAGE_VERSIONS, kind, version)


def test_drawn_configurations_keep_their_fingerprints(drawing):
    for each in RECORDED["plans"]:
        found = fingerprints_of(drawing.plan(each["settings"], each["methods"]))
        assert found == each["fingerprints"], each

"""What several test files share."""

from pathlib import Path

import pytest
from hfprune_launch import demo_assets
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def real_assets(tmp_path_factory):
    """The demo's models, text and tasks, made once from the packages that carry them."""
    folder = tmp_path_factory.mktemp("demo-assets")
    demo_assets.build(folder)
    return folder


def pytest_xdist_make_scheduler(config, log):
    return TogetherByFile(config, log)


class TogetherByFile(LoadScopeScheduling):
    """Where several workers run the tests, those of a file stay together, and those of the one Slurm cluster."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        return "tests/slurm" if file.startswith("tests/slurm/") else file


def pytest_collection_modifyitems(items):
    """The longest come first, so that no worker is left with them alone at the end."""
    items.sort(key=lambda item: _turn(item.path))


def _turn(file):
    longest_first = ["slurm", "launch", "stages"]
    folder = Path(file).relative_to(TESTS).parts[0]
    return longest_first.index(folder) if folder in longest_first else len(longest_first)

"""What several test files share."""

from pathlib import Path

import pytest

from launch import demo_assets


@pytest.fixture(scope="session")
def real_assets(tmp_path_factory):
    """The demo's models, text and tasks, made once from the packages that carry them."""
    folder = tmp_path_factory.mktemp("demo-assets")
    demo_assets.build(folder)
    return folder


def pytest_itemcollected(item):
    """Where several workers run the tests, those of a file stay together, and those of the one Slurm cluster."""
    on_cluster = item.get_closest_marker("slurm") is not None
    item.add_marker(pytest.mark.xdist_group("slurm" if on_cluster else item.path.stem))


def pytest_collection_modifyitems(items):
    """The longest come first, so that no worker is left with them alone at the end."""
    items.sort(key=lambda item: _turn(item.path))


def _turn(file):
    longest_first = ["slurm", "launch", "stages"]
    folder = Path(file).parent.name
    return longest_first.index(folder) if folder in longest_first else len(longest_first)

"""What several test files share."""

import pytest

from launch import demo_assets


@pytest.fixture(scope="session")
def real_assets(tmp_path_factory):
    """The demo's models, text and tasks, made once from the packages that carry them."""
    folder = tmp_path_factory.mktemp("demo-assets")
    demo_assets.build(folder)
    return folder

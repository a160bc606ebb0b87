"""Fixtures and hooks that several test files share."""

import gc
import os
import shlex
import signal
import sys
from pathlib import Path

import fork_server
import pytest
from engine_marks import engine_lacking
from gpu_marks import lacking
from hfprune_launch.demo_assets import build
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from hfprune_dist.store.artifacts import Store

TESTS = Path(__file__).parent
# Tests that take more than ten seconds, longest first: the others fill the gaps at the end.
LONG = [
    "slurm",
    "test_demo_assets.py",
    "launch/test_sweep.py",
    "faults",
    "launch/slurm",
    "launch",
    "stages",
    "checkpoints/test_families.py",
    "checkpoints/test_experts.py",
    "scoring",
    "training",
]
# How long an example takes depends only on the machine; what is drawn depends only on the test.
settings.register_profile("repeatable", parent=settings.default, deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def fake(monkeypatch):
    """Slurm's commands, answered in this process."""
    from fake_slurm import Controller

    return Controller().install(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration of small models and texts, made anew for each file of tests, which may change them."""
    from sweeps import make_inputs  # torch, which not all tests need, takes seconds

    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def real_assets(tmp_path_factory):
    """The demo's models, text and tasks, made once from the packages that contain them."""
    folder = tmp_path_factory.mktemp("demo-assets")
    build(folder)
    return folder


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also tests marked thorough, and every crash of the campaign")


def pytest_configure():
    fork_server.share()
    # A suite started in the background ignores Ctrl-C, and so would all processes that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_setupnodes(config, specs):
    """Workers share one fork server, whose forks they are; without workers, the first test that needs it starts it."""
    if len(specs) > 1:
        os.environ[fork_server.ADDRESS] = fork_server.start()
        worker = shlex.join(fork_server.forked([sys.executable, fork_server.WORKER]))
        for spec in specs:
            spec.python = worker


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports leave no garbage: collecting it would take a quarter of their time, and copy pages of forks."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.enable()
    return result


def pytest_runtest_setup(item):
    """Skip tests that need GPUs or engines where there are none, before anything is made for them."""
    reason = lacking(item) or engine_lacking(item)
    if reason:
        pytest.skip(reason)


def pytest_xdist_auto_num_workers(config):
    """Return the number of processors plus two: tests wait for the Slurm cluster, timeouts and the death of ranks."""
    return len(os.sched_getaffinity(0)) + 2


def pytest_xdist_make_scheduler(config, log):
    return TogetherByFile(config, log)


class TogetherByFile(LoadScopeScheduling):
    """Keeps tests of one file with one worker, and those of files that share the Slurm cluster or the GPUs."""

    def _split_scope(self, nodeid):
        file = nodeid.split("::")[0]
        for folder in ("tests/slurm", "tests/gpu"):
            if file.startswith(f"{folder}/"):
                return folder
        return file


def pytest_collection_modifyitems(config, items):
    """The longest tests first, in one order for all workers; thorough ones with --all, their marker or their name."""
    named = any("::" in argument for argument in config.args)
    if not (config.option.all or named or "thorough" in config.option.markexpr):
        thorough = [item for item in items if item.get_closest_marker("thorough")]
        items[:] = [item for item in items if item not in thorough]
        config.hook.pytest_deselected(items=thorough)
    items.sort(key=lambda item: (_turn(item.path), item.path))


def _turn(file):
    path = Path(file).relative_to(TESTS)
    places = {path.as_posix(), *(parent.as_posix() for parent in path.parents)}
    return next((turn for turn, name in enumerate(LONG) if name in places), len(LONG))

"""The real clusters of this folder's tests, what runs side by side there, and what every sweep must end with.

Most of a disturbed sweep's time is spent waiting. So tests marked ``beside`` all start together, each in its own
thread, when the folder's first test starts; those of one lane, ``beside("name")``, run one after another. They take
only fixtures that last for all of them and must not disturb each other: what belongs to a whole cluster (its
controller, its configuration) is for the lane "disturbed", nodes n3 and n4 for the lane "nodes".
"""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from clusters import LAUNCHERS, ONE_CELL, Cluster, label_of
from hfprune_launch.project import PROJECT
from hfprune_launch.slurm.snapshot import take_snapshot
from sweeps import finish, make_inputs

# Ports of the clusters.
PORT_BASE, DISTURBED_PORT_BASE = 18000, 19000


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(lane): starts with the first test of tests/slurm, in a thread")


@pytest.fixture(scope="package")
def _slurm():
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        message = "Slurm is not installed; on Debian, as root: slurm/cluster.sh install"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)


@pytest.fixture(scope="package")
def new_cluster(_slurm):
    """A context manager for a cluster with its own folder and five ports, which is taken down at the end."""

    @contextmanager
    def folder_of(port_base, cpus=2):
        # Sockets need a short path, and munge one that everybody may enter.
        cluster = Cluster(Path(tempfile.mkdtemp(prefix="hfprune-slurm-")), port_base, cpus)
        try:
            yield cluster
        finally:
            if (cluster.folder / "slurm.conf").exists():
                cluster.run("down")
            seen = subprocess.run(["pgrep", "--full", str(cluster.folder)], capture_output=True, text=True, check=False)
            assert not seen.stdout, "processes are left"
            shutil.rmtree(cluster.folder, ignore_errors=True)

    return folder_of


@pytest.fixture(scope="package")
def cluster(new_cluster):
    """Jobs that ask for nothing else run on n1 and n2; n3 and n4 are for tests that take nodes away from jobs."""
    with new_cluster(PORT_BASE, cpus=3) as started:
        started.run("up")
        started.slurm("scontrol", "update", "partitionname=main", "nodes=n[1-2]")
        yield started


@pytest.fixture(scope="package")
def disturbed(new_cluster):
    """A cluster that may be disturbed in every part: its controller, its prolog."""
    with new_cluster(DISTURBED_PORT_BASE) as started:
        prolog = started.folder / "prolog"
        prolog.write_text(f"#!/bin/bash\n[ ! -e {prolog}.fails.$SLURMD_NODENAME ]\n")
        prolog.chmod(0o755)
        (started.folder / "site.conf").write_text(f"Prolog={prolog}\n")
        started.run("up")
        yield started


@pytest.fixture(scope="package")
def config(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="package")
def finished(config, tmp_path_factory):
    """The sweep on this machine, without Slurm, with whose results every sweep on a cluster must end."""
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(config, out, *ONE_CELL)
    return out


@pytest.fixture(scope="package")
def code(tmp_path_factory):
    """The code of jobs as an earlier sweep left it: whole, and compiled."""
    folder = tmp_path_factory.mktemp("code")
    take_snapshot(PROJECT, folder)
    return folder


@pytest.fixture(scope="package")
def without(finished, code, tmp_path_factory):
    """Return a function that copies the finished sweep without some stages, e.g. "prune" or "evaluate alpha dense"."""

    def copy(*stages):
        out = tmp_path_factory.mktemp("part") / "out"
        shutil.copytree(finished, out)
        (out / "code").symlink_to(code)
        artifacts = [manifest.parent for manifest in (out / "store").glob("*/*/manifest.json")]
        for artifact in artifacts:
            if label_of(out, artifact) in stages:
                shutil.rmtree(artifact)
        return out

    return copy


@pytest.fixture(scope="package", autouse=True)
def _beside(request, _slurm):
    """Map each test that is marked ``beside`` to the end of its thread."""
    lanes: dict[str, list[pytest.Function]] = {}
    for item in request.session.items:
        if mark := item.get_closest_marker("beside"):
            lanes.setdefault(mark.args[0] if mark.args else item.nodeid, []).append(item)
    scenarios = {item.nodeid: _scenario(item, request) for lane in lanes.values() for item in lane}
    ends: dict[str, Future[None]] = {nodeid: Future() for nodeid in scenarios}

    def run(lane: list[pytest.Function]) -> None:
        for item in lane:
            try:
                ends[item.nodeid].set_result(scenarios[item.nodeid]())
            except BaseException as error:
                ends[item.nodeid].set_exception(error)

    pool = ThreadPoolExecutor(12)
    for name in sorted(lanes, key=lambda name: "::" in name):  # lanes with a name of their own take longest
        pool.submit(run, lanes[name])
    yield ends
    pool.shutdown(wait=False, cancel_futures=True)
    for launcher in LAUNCHERS:
        launcher.kill()
    pool.shutdown()


def _scenario(item: pytest.Function, request: pytest.FixtureRequest) -> Callable[[], None]:
    """Return a test's function with its arguments, all of which last for this folder's tests."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    names = inspect.signature(item.function).parameters
    return partial(
        item.function, **{name: given[name] if name in given else request.getfixturevalue(name) for name in names}
    )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Wait for the end of a test that is marked ``beside``, as it has already been started."""
    if not pyfuncitem.get_closest_marker("beside"):
        return None
    pyfuncitem.funcargs["_beside"][pyfuncitem.nodeid].result()
    return True


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Add the controllers' logs to a failure: only they say why a job was ended or requeued."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        clusters = {name: given for name, given in item.funcargs.items() if isinstance(given, Cluster)}
        report.sections += [(f"controller of {name}", one.controller_log()) for name, one in clusters.items()]

"""One real cluster for all tests of this folder, and the results that every disturbed sweep must end with."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from clusters import ONE_CELL, Cluster, label_of
from sweeps import finish, make_inputs

PORT_BASE = "18000"


@pytest.fixture(scope="session")
def cluster():
    path = f"{os.environ['PATH']}:/usr/sbin"
    if not all(shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged")):
        message = "Slurm is not installed; on Debian, as root: slurm/cluster.sh install"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    # Sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="hfprune-slurm-"))
    os.environ["PORT_BASE"] = PORT_BASE
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    started = Cluster(folder)
    try:
        started.run("up")
        yield started
    finally:
        started.run("down")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """The sweep on this machine, without Slurm: every sweep on the cluster must end where this one ends."""
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(config, out, *ONE_CELL)
    return out


@pytest.fixture(scope="session")
def without(finished, tmp_path_factory):
    """Makes a copy of the finished sweep in which some stages are missing, e.g. "prune" or "evaluate alpha dense"."""

    def copy(*stages):
        out = tmp_path_factory.mktemp("part") / "out"
        shutil.copytree(finished, out)
        artifacts = [manifest.parent for manifest in (out / "store").glob("*/*/manifest.json")]
        for artifact in artifacts:
            if label_of(out, artifact) in stages:
                shutil.rmtree(artifact)
        return out

    return copy

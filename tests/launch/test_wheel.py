"""The project as others install it: a wheel in its own venv, away from any clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hfprune_launch.project import PROJECT, Project
from hfprune_launch.slurm.snapshot import take_snapshot
from ranks import ROOT
from sweeps import finish, id_of, make_inputs, results, without_costs

import hfprune_dist
from hfprune_dist.store.atomic_files import read_json

pytestmark = pytest.mark.slow
PARTS = ["pyproject.toml", "hfprune_dist", "launch", "slurm", "configs", "README.md", ".gitignore"]
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
OFFLINE = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
# Five stages.
ONE_CELL = ["--models", "alpha", "--ratios", "0.2", "--methods", "hfprune"]
ONE_CELL += ["--set", "recovery.method=none", "--set", "evaluation.tasks=[]"]


def call(*command, **options):
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from a commit and installed without dependencies, which come from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv = folder / "source", folder / "venv"
    source.mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    for step in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        call(*GIT, *step, cwd=source)
    pip = [sys.executable, "-m", "pip"]
    call(*pip, "wheel", *OFFLINE, "--no-build-isolation", "-w", folder, source)
    call(sys.executable, "-m", "venv", "--without-pip", venv)
    call(*pip, "--python", venv / "bin" / "python", "install", *OFFLINE, *folder.glob("*.whl"))
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(call(venv / "bin" / "python", "-c", ask).strip())
    # A folder named in a .pth file has none of its own .pth files read, so the clone stays out of sight.
    (packages / "dependencies.pth").write_text(f"{Path(yaml.__file__).parents[1]}\n")
    commit = call("git", "rev-parse", "HEAD", cwd=source).strip()
    return SimpleNamespace(commit=commit, hfprune=venv / "bin" / "hfprune", packages=packages)


def test_a_wheel_knows_its_version_and_commit(installed, tmp_path):
    shown = call(installed.hfprune, "--version", cwd=tmp_path).splitlines()
    launch = installed.packages / "hfprune_launch"
    assert shown == [
        f"hfprune {hfprune_dist.__version__}",
        f"commit: {installed.commit}",
        f"configurations: {launch / 'configs'}",
        f"Slurm profiles: {launch / 'profiles'}",
    ]


def test_a_wheel_has_all_configurations_profiles_and_code(installed, tmp_path):
    """Jobs of an installed wheel run the same code as those of the clone that it was built from."""
    wheel = Project.around(installed.packages / "hfprune_launch")
    for ours, theirs in ((PROJECT.configs, wheel.configs), (PROJECT.profiles, wheel.profiles)):
        files = sorted(file.relative_to(ours) for file in ours.rglob("*.yaml"))
        assert files == sorted(file.relative_to(theirs) for file in theirs.rglob("*.yaml"))
        assert all((ours / file).read_bytes() == (theirs / file).read_bytes() for file in files)
    ours, theirs = (take_snapshot(project, tmp_path / name) for name, project in (("a", PROJECT), ("b", wheel)))
    assert ours.name.split("-")[0] == theirs.name.split("-")[0]


@pytest.mark.thorough
def test_a_wheel_takes_up_a_sweep(installed, tmp_path):
    """Its ranks come to the results that a clone's had, and leave nothing in the system's temporary folder."""
    config, out = make_inputs(tmp_path / "inputs"), tmp_path / "out"
    finish(config, out, *ONE_CELL, "--ranks", "1")
    before = [without_costs(row) for row in results(out)]
    evaluation = out / "store" / id_of(out, "evaluate alpha 0.2 hfprune")
    shutil.rmtree(evaluation)
    (out / "report.html").unlink()
    away, temporary = tmp_path / "away", tmp_path / "tmp"
    for folder in (away, temporary):
        folder.mkdir()
    places = {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}  # torch's own
    environment = {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    shown = call(installed.hfprune, "sweep", "--config", config, "--out", out, *ONE_CELL, cwd=away, env=environment)
    assert "1 of 5 stages to run, 2 ranks each" in shown
    assert [without_costs(row) for row in results(out)] == before
    assert list(temporary.iterdir()) == []
    assert "alpha 0.2" in (out / "report.html").read_text(), "its styles and script are in the wheel"
    manifest = read_json(evaluation / "manifest.json")
    provenance = manifest["provenance"]
    assert manifest["world_size"] == 2
    assert (provenance["hfprune_dist"], provenance["git_commit"]) == (hfprune_dist.__version__, installed.commit)
    assert provenance["dirty_diff_sha256"] is None

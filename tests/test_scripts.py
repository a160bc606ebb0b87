"""Shell scripts: what they refuse, and surroundings in which they work all the same; nothing is installed here."""

import os
import shutil
import subprocess

import pytest
from ranks import ROOT

CLUSTER = ROOT / "slurm" / "cluster.sh"
# Stands in for Python and, in an environment, for its pip and the project's commands.
PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
[ "$1 $2" != "$FAILS" ] || exit 1
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
    for name in ("setup.sh", "quickstart.sh"):
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
            env={**os.environ, "CALLS": str(calls), "PATH": path, "PYTHON_BASE": "", "FAILS": "", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return result, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(("fails", "installer"), [("none", "uv pip"), ("-m uv", "pip")])
def test_the_quickstart_installs_once(quickstart, project, fails, installer):
    result, calls = quickstart(FAILS=fails)
    assert result.returncode == 0, result.stderr
    assert f"-m venv {project}/.venv" in calls
    assert any(call.startswith(f"-m {installer} install") and call.endswith(f"-e {project}[demo]") for call in calls)
    assert quickstart()[1] == ["launch/demo_assets.py", "launch/sweep.py --config configs/demo.yaml"]


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

"""The copy of the code that jobs run: complete, checked before it is reused, and not used where it has been damaged."""

import pytest
from hfprune_launch.project import Project
from hfprune_launch.slurm.snapshot import take_snapshot
from ranks import ROOT

MODULES = {"hfprune_dist/__init__.py": "", "hfprune_dist/stages/prune.py": "x = 1\n", "launch/job.py": "print('job')\n"}


@pytest.fixture
def project(tmp_path):
    """A miniature project: packages with a subpackage, and files that jobs don't need."""
    for name, text in {**MODULES, "launch/setup.sh": "true\n", "launch/__pycache__/job.cpython-311.pyc": "x"}.items():
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "project" / name).write_text(text)
    return Project.around(tmp_path / "project" / "launch")


def assert_whole(snapshot):
    """Check a snapshot's files; the folder launch is named after its package."""
    found = {str(file.relative_to(snapshot)): file.read_text() for file in snapshot.rglob("*.py")}
    assert found == {name.replace("launch/", "hfprune_launch/"): text for name, text in MODULES.items()}


def test_every_file_of_the_library_is_in_its_snapshot(tmp_path):
    """The snapshot is all that jobs import and read of the project."""
    snapshot = take_snapshot(Project.around(ROOT / "launch"), tmp_path)
    files = [file for file in (ROOT / "hfprune_dist").rglob("*") if file.is_file()]
    # Left out: READMEs, and the files that reports are made from, as jobs write none.
    library = [file for file in files if file.suffix not in (".pyc", ".md", ".css", ".js", ".png")]
    assert len(library) > 50
    for file in library:
        assert (snapshot / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert (snapshot / "hfprune_launch" / "slurm" / "job.py").is_file()


def test_a_good_snapshot_is_used_as_it_is_and_other_code_gets_its_own(project, tmp_path):
    """Running jobs import from it, so neither it nor the files they have left there are touched."""
    folder = tmp_path / "code"
    snapshot = take_snapshot(project, folder)
    assert_whole(snapshot)
    (snapshot / "core.4711").write_bytes(b"left by a job")
    before = {file: file.stat().st_ino for file in snapshot.rglob("*")}
    assert take_snapshot(project, folder) == snapshot
    assert {file: file.stat().st_ino for file in snapshot.rglob("*")} == before and list(folder.iterdir()) == [snapshot]
    (tmp_path / "project" / "launch" / "job.py").write_text("print('new')\n")
    assert take_snapshot(project, folder) != snapshot and snapshot.is_dir()


def test_a_damaged_snapshot_is_left_to_its_jobs_and_another_one_made(project, tmp_path):
    snapshot = take_snapshot(project, tmp_path / "code")
    (snapshot / "hfprune_launch" / "torch.py").write_text("raise SystemExit\n")
    another = take_snapshot(project, tmp_path / "code")
    assert_whole(another)
    assert another != snapshot and snapshot.is_dir() and take_snapshot(project, tmp_path / "code") == another

"""The copy of the code that jobs run: complete, checked before it is reused, and not used where it has been damaged."""

import pytest
from hfprune_launch.project import Project
from hfprune_launch.slurm.snapshot import take_snapshot
from ranks import ROOT

COMMIT = {"git_commit": "abc"}


@pytest.fixture
def project(tmp_path):
    """A miniature project: packages with a subpackage, and files that jobs don't need."""
    project = tmp_path / "project"
    for name, text in {
        "hfprune_dist/__init__.py": "",
        "hfprune_dist/stages/prune.py": "x = 1\n",
        "launch/job.py": "print('job')\n",
        "launch/setup.sh": "true\n",
        "launch/__pycache__/job.cpython-311.pyc": "compiled",
    }.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    return project


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "code"


def snapshot_of(project, *arguments):
    return take_snapshot(Project.around(project / "launch"), *arguments)


def content(snapshot):
    return {str(file.relative_to(snapshot)): file.read_text() for file in snapshot.rglob("*.py")}


def copied(project):
    """Return a project's files as a snapshot has them: the folder launch is named after its package."""
    return {name.replace("launch/", "hfprune_launch/"): text for name, text in content(project).items()}


def test_every_file_of_the_library_is_in_its_snapshot(folder):
    """The snapshot is all that jobs import and read of the project."""
    snapshot = snapshot_of(ROOT, folder, COMMIT)
    files = [file for file in (ROOT / "hfprune_dist").rglob("*") if file.is_file()]
    # Left out: READMEs, and the files that reports are made from, as jobs write none.
    library = [file for file in files if file.suffix not in (".pyc", ".md", ".css", ".js", ".png")]
    assert len(library) > 50
    for file in library:
        assert (snapshot / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    assert (snapshot / "hfprune_launch" / "slurm" / "job.py").is_file()


def test_a_good_snapshot_is_used_as_it_is_and_other_code_gets_its_own(project, folder):
    """Running jobs import from it, so neither it nor the files they have left there are touched."""
    snapshot = snapshot_of(project, folder, COMMIT)
    assert content(snapshot) == copied(project) and '"abc"' in (snapshot / "provenance.json").read_text()
    (snapshot / "core.4711").write_bytes(b"left by a job")
    before = {file: file.stat().st_ino for file in snapshot.rglob("*")}
    assert snapshot_of(project, folder, {"git_commit": "another"}) == snapshot
    assert {file: file.stat().st_ino for file in snapshot.rglob("*")} == before and list(folder.iterdir()) == [snapshot]
    (project / "launch" / "job.py").write_text("print('new')\n")
    assert snapshot_of(project, folder, COMMIT) != snapshot and snapshot.is_dir()


@pytest.mark.parametrize("damage", ["removed", "added"])
def test_a_damaged_snapshot_is_left_to_its_jobs_and_another_one_made(project, folder, damage):
    snapshot = snapshot_of(project, folder, COMMIT)
    file = snapshot / "hfprune_launch" / "job.py"
    if damage == "added":
        file.with_name("torch.py").write_text("raise SystemExit\n")
    else:
        file.unlink()
    another = snapshot_of(project, folder, COMMIT)
    assert another != snapshot and content(another) == copied(project) and snapshot.is_dir()
    assert snapshot_of(project, folder, COMMIT) == another and len(list(folder.iterdir())) == 2

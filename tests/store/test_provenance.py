import platform
import subprocess

import pytest

from hfprune_dist.store import provenance
from hfprune_dist.store.provenance import code_version, package_versions


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)


def test_changes_in_any_encoding_have_a_digest(tmp_path):
    """git prints a Latin-1 text as it is."""
    git(tmp_path, "init", "--quiet")
    text = tmp_path / "notes.txt"
    text.write_bytes(b"caf\xe9\n")
    git(tmp_path, "add", "notes.txt")
    git(tmp_path, "commit", "--quiet", "--message", "notes")
    committed = code_version(tmp_path)
    assert committed["git_commit"] and committed["dirty_diff_sha256"] is None
    found = set()
    for changed in (b"\xe9t\xe9\n", b"\xe0\n"):
        text.write_bytes(changed)
        found.add(code_version(tmp_path)["dirty_diff_sha256"])
    git(tmp_path, "checkout", "--quiet", ".")
    assert code_version(tmp_path) == committed
    (tmp_path / "my.yaml").touch()
    assert code_version(tmp_path) == committed, "no stage reads it"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "new.py").touch()
    found.add(code_version(tmp_path)["dirty_diff_sha256"])
    assert len(found) == 3 and None not in found


def test_outside_of_a_repository_no_commit_is_known(tmp_path):
    assert code_version(tmp_path) == {"git_commit": None, "dirty_diff_sha256": None}


def test_a_package_that_is_not_there_has_no_version():
    assert package_versions(["pytest", "no-such-package"]) == {"pytest": pytest.__version__, "no-such-package": None}


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("processor : 0\nmodel name\t: A: fast one \nmodel name\t: Another\n", "A: fast one"),
        ("processor : 0\nmodel name\t: \n", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_a_processor_without_a_name_is_called_by_its_architecture(tmp_path, monkeypatch, said, name):
    monkeypatch.setattr(provenance, "CPU_INFO", tmp_path / "cpuinfo")
    if said is not None:
        (tmp_path / "cpuinfo").write_text(said)
    assert provenance.cpu_model() == name

import subprocess

from hfprune_dist.store.provenance import code_version


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)


def test_changes_in_any_encoding_have_a_digest(tmp_path):
    """git prints a Latin-1 text as it is."""
    assert code_version(tmp_path) == {"git_commit": None, "dirty_diff_sha256": None}
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
    (tmp_path / "my.yaml").touch()
    assert code_version(tmp_path) == committed, "no stage reads it"
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "new.py").touch()
    found.add(code_version(tmp_path)["dirty_diff_sha256"])
    assert len(found) == 3 and None not in found

"""Named folders: complete or absent, whatever happens, and what the user puts there stays."""

import errno
import itertools
import os
import shutil
from pathlib import Path

import pytest
from faults.kill import die_in_fork

from hfprune_dist.results.checkpoint_folders import DRAFT, WRITTEN, CheckpointFolders, Contents

FILES = ("model.safetensors", "adapter/adapter_model.safetensors")


class Sweep:
    """A store with artifacts, and the named folders next to it."""

    def __init__(self, out):
        self.root, self.store = out / "checkpoints", out / "store"
        self.folders = CheckpointFolders(self.root, self.store)

    def contents(self, artifact="a", card="a card", second_name="second"):
        folder = self.store / "recover" / artifact
        for name in FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{artifact}: {name}")
        texts = {"README.md": card, "adapter/adapter_config.json": f"base of {artifact}"}
        return Contents(second_name, {name: folder / name for name in FILES}, texts)

    def update(self, **wanted):
        return CheckpointFolders(self.root, self.store).update(wanted).remarks

    def shown(self):
        """Map the name of each folder to what a reader finds in it."""
        folders = list(self.root.glob("[!.]*"))
        return {
            folder.name: {str(it.relative_to(folder)): it.read_text() for it in folder.rglob("*") if it.is_file()}
            for folder in folders
        }


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


def whole(contents):
    return {**{name: path.read_text() for name, path in contents.links.items()}, **contents.texts}


def test_a_folder_has_links_and_texts_and_moves_with_its_sweep(sweep, tmp_path):
    contents = sweep.contents()
    assert sweep.update(name=contents) == []
    assert sweep.shown() == {"name": whole(contents)}
    assert not (sweep.root / "name" / "model.safetensors").readlink().is_absolute()
    moved = tmp_path / "moved"
    moved.mkdir()
    for part in ("checkpoints", "store"):
        shutil.move(tmp_path / part, moved / part)
    assert Sweep(moved).shown() == {"name": whole(Sweep(moved).contents())}


def test_a_second_update_writes_nothing(sweep):
    contents = sweep.contents()
    sweep.update(name=contents)
    before = {path: path.lstat() for path in sweep.root.rglob("*")}
    sweep.update(name=contents)
    after = {path: path.lstat() for path in sweep.root.rglob("*")}
    assert {path: (it.st_ino, it.st_mtime_ns) for path, it in after.items()} == {
        path: (it.st_ino, it.st_mtime_ns) for path, it in before.items()
    }


def test_a_new_card_is_written_a_new_artifact_is_linked_and_a_row_that_is_gone_goes(sweep):
    sweep.update(one=sweep.contents(), two=sweep.contents("b"))
    changed = {"one": sweep.contents(card="another"), "two": sweep.contents("c")}
    assert sweep.update(**changed) == []
    assert sweep.shown() == {name: whole(contents) for name, contents in changed.items()}
    shutil.rmtree(sweep.store / "recover" / "c")
    assert sweep.update(one=changed["one"]) == [] and [*sweep.shown()] == ["one"]


def test_an_edited_card_and_files_of_the_users_stay(sweep):
    sweep.update(name=sweep.contents())
    folder = sweep.root / "name"
    (folder / "README.md").write_text("my own words")
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter" / "adapter_config.json").unlink()
    (remark,) = sweep.update(name=sweep.contents(card="another"))
    assert "README.md: left as it is" in remark
    assert (folder / "README.md").read_text() == "my own words" and (folder / "adapter/adapter_config.json").is_file()
    # The row gets another checkpoint: the user's folder stays where it is, ours gets the second name.
    other = sweep.contents("b")
    (remark,) = sweep.update(name=other)
    assert "name holds files of yours" in remark and "second" in remark
    assert (folder / "notes.txt").read_text() == "mine" and sweep.shown()["second"] == whole(other)
    (remark,) = sweep.update()
    assert "name: its row is gone, but it stays" in remark and [*sweep.shown()] == ["name"]


@pytest.mark.parametrize("content", ["", "[]", "{}", *(f'{{"sha256": {it}}}' for it in ("null", "1", '"a"', "[[1]]"))])
def test_where_the_record_of_what_was_written_is_damaged_other_texts_count_as_the_users(sweep, content):
    sweep.update(name=sweep.contents())
    (sweep.root / WRITTEN).write_text(content)
    assert sweep.update(name=sweep.contents()) == []
    (sweep.root / WRITTEN).write_text(content)
    (remark,) = sweep.update(name=sweep.contents(card="another card"))
    assert remark == f"{sweep.root / 'name' / 'README.md'}: left as it is, since it was edited"


def test_where_links_would_lead_elsewhere_nothing_is_written(sweep, tmp_path):
    (tmp_path / "another" / "disk").mkdir(parents=True)
    sweep.root.symlink_to(tmp_path / "another" / "disk")
    (remark,) = sweep.update(name=sweep.contents())
    assert remark.startswith(f"{sweep.root} is a link") and not list(sweep.root.iterdir())
    sweep.root.unlink()
    assert sweep.update(name=sweep.contents()) == [] and sweep.shown() == {"name": whole(sweep.contents())}


def test_a_row_that_gets_another_name_says_so(sweep):
    """All rows of a folder get other names when a second method joins."""
    sweep.update(one=sweep.contents("a"), two=sweep.contents("b"))
    (sweep.root / "two" / "notes.txt").write_text("mine")
    renamed = {"one-hfprune": sweep.contents("a"), "two-hfprune": sweep.contents("b")}
    one, two = sweep.update(**renamed)
    assert one == f"{sweep.root / 'one'} is called one-hfprune now"
    assert two.startswith(f"{sweep.root / 'two'}: its checkpoint is called two-hfprune now, but it stays")
    assert {*sweep.shown()} == {*renamed, "two"}


def test_what_was_never_ours_is_not_touched(sweep):
    sweep.root.mkdir()
    (sweep.root / "name").write_text("a file")
    (sweep.root / "second").mkdir()
    (sweep.root / "second" / "model.safetensors").write_text("a copy")
    remarks = sweep.update(name=sweep.contents())
    assert len(remarks) == 2 and "second: left as it is" in remarks[1]
    assert sweep.update() == []
    assert (sweep.root / "name").read_text() == "a file"
    assert sweep.shown()["second"] == {"model.safetensors": "a copy"}


def test_links_tell_what_is_in_use(sweep):
    sweep.update(name=sweep.contents())
    (sweep.root / "mine").symlink_to("../store/prune/x")
    (sweep.root / "elsewhere").symlink_to("/etc")
    found = {str(it) for it in sweep.folders.linked()}
    assert found == {"prune/x", *(f"recover/a/{name}" for name in FILES)}


def test_at_every_point_of_an_update(tmp_path):
    """One folder gets a new card, another new links; a folder is removed in the same way as it is replaced."""
    operations = ("rename", "replace", "symlink", "unlink")
    for kill_at in itertools.count(1):
        sweep = Sweep(tmp_path / str(kill_at))
        before = {name: sweep.contents(name) for name in ("card", "links")}
        sweep.update(**before)
        after = {"card": sweep.contents("card", card="new"), "links": sweep.contents("other")}
        died = die_in_fork(lambda sweep=sweep, after=after: sweep.update(**after), kill_at, "", operations)
        for name, found in sweep.shown().items():
            assert found in [whole(it[name]) for it in (before, after) if name in it], f"operation {kill_at}"
        assert sweep.update(**after) == [], f"operation {kill_at}: ours was taken for the user's"
        assert sweep.shown() == {name: whole(contents) for name, contents in after.items()}
        assert not list(sweep.root.glob(".hfprune*"))
        if not died:
            break
    assert kill_at > 12


def test_what_somebody_has_open_is_removed_another_time(sweep, monkeypatch):
    """On NFS, its folder stays until then."""
    sweep.update(one=sweep.contents(), two=sweep.contents("b"))
    changed = {"one": sweep.contents("c")}

    def refuse(*_, **__):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        assert sweep.update(**changed) == []
        assert sweep.update(**changed) == []
    assert sweep.shown() == {"one": whole(changed["one"])} and len([*sweep.root.glob(f"{DRAFT}*")]) == 2
    sweep.update(**changed)
    assert not [*sweep.root.glob(f"{DRAFT}*")]


def test_what_a_user_removes_at_this_moment_is_not_there(sweep, monkeypatch):
    """Such as an editor's swap file."""
    contents = sweep.contents()
    sweep.update(name=contents)
    (sweep.root / "name" / ".README.md.swp").write_text("")
    read = Path.read_bytes

    def gone(file):
        if file.suffix == ".swp":
            file.unlink(missing_ok=True)
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", gone)
    assert sweep.update(name=contents) == [] and sweep.shown() == {"name": whole(contents)}

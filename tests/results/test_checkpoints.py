"""Named folders: plain and whole whatever happens, and what the user puts there stays."""

import itertools
import re
import shutil

import pytest
from faults.kill import die_in_fork
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.planning.plan import Cell
from hfprune_dist.results import checkpoints
from hfprune_dist.results.checkpoints import LONGEST_NAME, MADE, Contents, File, checkpoint_names, update_checkpoints
from hfprune_dist.store.hashing import FileHashes

FILES = ("config.json", "model.safetensors", "adapter/adapter_model.safetensors")


class Sweep:
    """A store with artifacts, and the named folders next to it."""

    def __init__(self, out):
        self.out, self.root = out, out / "checkpoints"

    def contents(self, artifact="a", card="a card"):
        folder = self.out / "store" / "recover" / artifact
        for name in FILES:
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(f"{artifact}: {name}")
        files = {
            name: File((folder / name).stat().st_size, FileHashes(None).of_file(folder / name), artifact.count("again"))
            for name in FILES
        }
        return Contents(f"recover/{artifact}", folder, files, {"README.md": card})

    def update(self, **wanted):
        return list(update_checkpoints(self.out, wanted).remarks)

    def shown(self):
        """Map the name of each folder to what a reader finds in it."""
        folders = list(self.root.glob("[!.]*"))
        return {
            folder.name: {
                str(file.relative_to(folder)): file.read_text()
                for file in folder.rglob("*")
                if file.is_file() and file.name != MADE
            }
            for folder in folders
        }


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep whose files are all taken for large ones."""
    monkeypatch.setattr(checkpoints, "SMALL", 1)
    return Sweep(tmp_path)


def whole(contents):
    return {**{name: (contents.artifact / name).read_text() for name in contents.files}, **contents.texts}


def test_folders_follow_their_rows_and_a_second_update_writes_nothing(sweep):
    sweep.update(one=sweep.contents(), two=sweep.contents("b"))
    changed = {"one": sweep.contents(card="another"), "two": sweep.contents("c")}
    assert sweep.update(**changed) == []
    assert sweep.shown() == {name: whole(contents) for name, contents in changed.items()}
    before = {path: path.stat().st_ino for path in sweep.root.glob("[!.]*/**/*")}
    sweep.update(**changed)
    assert {path: path.stat().st_ino for path in sweep.root.glob("[!.]*/**/*")} == before
    shutil.rmtree(sweep.out / "store" / "recover" / "c")
    assert sweep.update(one=changed["one"], two=None) == [], "the row is there, its checkpoint isn't"
    assert {*sweep.shown()} == {"one", "two"}
    assert sweep.update(one=changed["one"]) == [] and [*sweep.shown()] == ["one"]


def test_what_is_saved_into_a_folder_in_place_harms_no_artifact_and_is_the_users(sweep):
    contents = sweep.contents()
    sweep.update(name=contents)
    weights = sweep.root / "name" / "model.safetensors"
    before = (contents.artifact / weights.name).read_text()
    with weights.open("r+") as stream:  # as safetensors does, whose file keeps its size
        stream.write("x" * weights.stat().st_size)
    assert (contents.artifact / weights.name).read_text() == before
    (remark,) = sweep.update(name=sweep.contents(card="another"))
    assert "left as it is, since model.safetensors in it is yours" in remark


def test_a_checkpoint_that_was_made_again_is_written_again(sweep):
    contents = sweep.contents()
    sweep.update(name=contents)
    files = {name: File(file.bytes, file.sha256, mtime_ns=5) for name, file in contents.files.items()}
    again = Contents(contents.checkpoint, contents.artifact, files, contents.texts)
    assert sweep.update(name=again) == [] and sweep.shown() == {"name": whole(again)}


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "link", "adapter/more.txt"])
def test_a_folder_in_which_a_file_is_the_users_stays(sweep, name):
    sweep.update(name=sweep.contents())
    file = sweep.root / "name" / name
    file.symlink_to("config.json") if name == "link" else file.write_text("mine")
    before = sweep.shown()
    assert sweep.update(name=sweep.contents()) == [], "nothing is to be written"
    for contents in (sweep.contents(card="another"), sweep.contents("b")):
        (remark,) = sweep.update(name=contents)
        assert f"name: left as it is, since {name} in it is yours" in remark
    (remark,) = sweep.update()
    assert "name: its row is gone, but it stays" in remark and sweep.shown() == before
    file.unlink()
    assert sweep.update(name=contents) == [] and sweep.shown() == {"name": whole(contents)}


def test_a_folder_with_weights_of_the_users_is_no_rows(sweep):
    sweep.root.mkdir()
    (sweep.root / "file").write_text("a file")
    (sweep.root / "name").mkdir()
    (sweep.root / "name" / "model.safetensors").write_text("a copy")
    update = update_checkpoints(sweep.out, {"name": sweep.contents(), "file": sweep.contents("b")})
    assert len(update.remarks) == 2 and update.folders == {}
    assert sweep.update() == []
    assert (sweep.root / "file").read_text() == "a file"
    assert sweep.shown()["name"] == {"model.safetensors": "a copy"}


def test_at_every_point_of_an_update(tmp_path, monkeypatch):
    """One folder gets a new card, one another checkpoint, one goes. Every folder is whole."""
    monkeypatch.setattr(checkpoints, "SMALL", 1)
    for kill_at in itertools.count(1):
        sweep = Sweep(tmp_path / str(kill_at))
        before = {name: sweep.contents(name) for name in ("card", "weights", "gone")}
        sweep.update(**before)
        after = {"card": sweep.contents("card", card="new"), "weights": sweep.contents("other")}
        died = die_in_fork(
            lambda sweep=sweep, after=after: sweep.update(**after), kill_at, "", ("rename", "link", "rmdir")
        )
        known = [whole(contents) for contents in (*before.values(), *after.values())]
        for name, files in sweep.shown().items():
            assert files in known, (name, kill_at)
        assert sweep.update(**after) == [], f"operation {kill_at}"
        expected = {name: whole(contents) for name, contents in after.items()}
        assert sweep.shown() == expected and not [*sweep.root.glob(".[!l]*")], "drafts are gone too"
        if not died:
            break
    assert kill_at > 8


# Names.


def cell(model="llama", ratio=0.2, method="hfprune", recovery="lora"):
    return Cell("", model, ratio, method, None, recovery, ("recover/1",), "evaluate/1")


def test_a_name_tells_model_ratio_method_and_recovery():
    named = {
        "A_b-0.2-hfprune-lora": cell("A_b"),
        "llama-0.2-hfprune-lora": cell(),
        "llama-0.2-surgeon": cell(method="surgeon", recovery="none"),
        "llama-0.2-loraprune": cell(method="loraprune", recovery="own"),
        "llama-dense-lora": cell(ratio=None, method=None),
        "a-b-c-0.2-hfprune-lora": cell("a/../b c"),
    }
    dense = Cell("llama dense", "llama", None, None, None, "none", (), "evaluate/1")
    assert checkpoint_names([*named.values(), dense]) == named, "the dense model is the user's own"


MODELS = st.text("aA.-_ /模\n", max_size=8) | st.sampled_from(["a..-..a", "a" * 100, "a" * 120, "A" * 120])


@settings(max_examples=60)
@given(st.lists(MODELS, min_size=1, max_size=4, unique=True), st.sampled_from(["lora", "none"]))
def test_every_row_has_a_name_that_file_systems_and_the_hub_allow(models, recovery):
    rows = [cell(model, recovery=recovery) for model in models]
    names = checkpoint_names(rows)
    assert sorted(names.values(), key=rows.index) == rows and checkpoint_names(rows[::-1]) == names
    assert len({name.casefold() for name in names}) == len(rows)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and len(name) <= LONGEST_NAME
        assert ".." not in name and "--" not in name and not name.endswith((".", "-"))

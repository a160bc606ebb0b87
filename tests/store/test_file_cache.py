"""A cached file is taken whole or not at all, whatever happened to the process that stored it."""

import itertools

from faults.kill import die_in_fork

from hfprune_dist.store.file_cache import FileCache

KEY = "rows.safetensors"


def kept(folder, content="rows"):
    source = folder / "source"
    source.write_text(content)
    cache = FileCache(folder / "cache")
    cache.put(KEY, source)
    return cache


def test_what_was_kept_is_taken(tmp_path):
    cache, target = kept(tmp_path), tmp_path / "target"
    (tmp_path / "source").unlink()
    assert cache.take(KEY, target)
    assert target.read_text() == "rows"
    assert not cache.take("other", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_damaged_file_is_not_taken_but_replaced(tmp_path):
    cache = kept(tmp_path)
    (tmp_path / "cache" / KEY).write_text("rowz")
    assert not cache.take(KEY, tmp_path / "target")
    assert kept(tmp_path).take(KEY, tmp_path / "target")
    assert (tmp_path / "target").read_text() == "rows"


def test_a_damaged_note_is_no_promise(tmp_path):
    cache = kept(tmp_path)
    for note in ("", "[]", "{"):
        (tmp_path / "cache" / f"{KEY}.json").write_text(note)
        assert not cache.take(KEY, tmp_path / "target")


def test_death_at_every_point(tmp_path):
    taken = []
    for kill_at in itertools.count(1):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        died = die_in_fork(lambda folder=folder: kept(folder), kill_at, folder)
        cache = FileCache(folder / "cache")
        taken.append(cache.take(KEY, folder / "target"))
        assert not taken[-1] or (folder / "target").read_text() == "rows"
        assert kept(folder).take(KEY, folder / "again")
        if not died:
            break
    assert taken.index(True) > 3, "points of death before the promise"


def test_a_folder_that_can_not_be_made_keeps_nothing_and_stops_nobody(tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    source = tmp_path / "file"
    source.write_text("rows")
    cache = FileCache(tmp_path / "cache")
    cache.put("key", source)
    assert not cache.take("key", tmp_path / "taken") and not (tmp_path / "taken").exists()
    assert source.read_text() == "rows" and (tmp_path / "cache").read_text() == "not a folder"

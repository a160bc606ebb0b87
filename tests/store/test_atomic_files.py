"""Modes of new files follow the umask, which is read without being changed; files of JSON are JSON."""

import ast
import os
from pathlib import Path

import pytest

from hfprune_dist.store import atomic_files

ROOT = Path(__file__).parents[2]
# Modules whose texts aren't files of JSON, or must have Python's names for numbers that aren't finite: config.json as
# transformers wrote it, and log-likelihoods of unfinished tasks.
NOT_STRICT = {
    "hfprune_dist/checkpoints/tensor_files.py",
    "hfprune_dist/checkpoints/write_pruned.py",
    "hfprune_dist/config/parameters.py",
    "hfprune_dist/evaluation/sharded_lm.py",
    "launch/api.py",
    "launch/benchmark/isolated.py",
    "launch/schema.py",
}


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_is_read_with_and_without_linux(umask, tmp_path):
    status = tmp_path / "status"
    assert atomic_files._umask(status) == umask and atomic_files._umask() == umask
    status.write_text("Name:\tpython\nUmask:\t0137\n")
    assert atomic_files._umask(status) == 0o137
    assert atomic_files.usual_mode() == 0o666 & ~umask


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_threads_never_see_another_umask(umask, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("set while other threads make files"))
    assert atomic_files.usual_mode() == 0o666 & ~umask
    monkeypatch.undo()


def test_numbers_that_json_has_no_word_for_are_refused(tmp_path):
    atomic_files.write_json(tmp_path / "a.json", {"b": 1, "a": None}, sort_keys=False)
    assert list(atomic_files.read_json(tmp_path / "a.json")) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        atomic_files.write_json(tmp_path / "a.json", [float("nan")])
    assert atomic_files.read_json(tmp_path / "a.json") == {"b": 1, "a": None}


def test_no_module_writes_others():
    lax = set()
    for file in [*ROOT.glob("hfprune_dist/**/*.py"), *ROOT.glob("launch/**/*.py")]:
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        dumps = [call for call in calls if ast.unparse(call.func) in ("json.dump", "json.dumps")]
        if any("allow_nan" not in {keyword.arg for keyword in call.keywords} for call in dumps):
            lax.add(str(file.relative_to(ROOT)))
    assert lax == NOT_STRICT

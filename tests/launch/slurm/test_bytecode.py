"""Bytecode of a snapshot: complete before a job runs, never written by one, repaired where a full disk cut it off."""

import os
import resource
import subprocess
import sys

import pytest
from hfprune_launch.slurm.bytecode import compile_sources

LINES = 400


@pytest.fixture
def sources(tmp_path):
    files = [tmp_path / "package" / "__init__.py", tmp_path / "package" / "long.py"]
    files[0].parent.mkdir()
    files[0].write_text("")
    files[1].write_text("".join(f"name_{line} = 'value {line}'\n" for line in range(LINES)))
    return files


def compiled(source):
    return source.parent / "__pycache__" / f"{source.stem}.{sys.implementation.cache_tag}.pyc"


def imported(source, **limits):
    """Import the long module in a separate process; ``no_room`` limits what it can write."""
    return subprocess.run(
        [sys.executable, "-c", f"import package.long; print(package.long.name_{LINES - 1})"],
        cwd=source.parents[1],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        **limits,
    )


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def test_jobs_find_bytecode_and_write_none(sources):
    compile_sources(sources)
    before = {source: compiled(source).stat().st_mtime_ns for source in sources}
    os.utime(sources[1], (1, 1))  # copies modification times
    assert imported(sources[1]).stdout == f"value {LINES - 1}\n"
    compile_sources(sources)
    assert {source: compiled(source).stat().st_mtime_ns for source in sources} == before


def test_what_a_full_disk_cut_off_is_made_again(sources):
    imported(sources[1], preexec_fn=no_room)
    if "EOFError" not in imported(sources[1]).stderr:
        pytest.skip("this Python notices what a disk doesn't take")
    compile_sources(sources)
    assert imported(sources[1]).stdout == f"value {LINES - 1}\n"


@pytest.mark.parametrize("damage", [b"", b"no bytecode at all, as long as a header"])
def test_other_damage_is_mended_too(sources, damage):
    compile_sources(sources)
    compiled(sources[1]).write_bytes(damage)
    compile_sources(sources)
    assert imported(sources[1]).stdout == f"value {LINES - 1}\n"


def test_a_disk_that_is_full_meanwhile_leaves_nothing_cut_off(sources):
    script = "import sys, pathlib; from hfprune_launch.slurm.bytecode import compile_sources as c; "
    result = subprocess.run(
        [sys.executable, "-c", script + "c(map(pathlib.Path, sys.argv[1:]))", *map(str, sources)],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=no_room,
    )
    assert "No space left on device" in result.stderr and not compiled(sources[1]).exists()

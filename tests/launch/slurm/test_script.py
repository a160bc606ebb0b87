"""The batch script, run by bash with a fake srun: what reaches the ranks, and what ends the job before they start."""

import os
import shlex
import subprocess
import unicodedata
from types import SimpleNamespace

import pytest
from hfprune_launch import sweep
from hfprune_launch.slurm.profile import Resources
from hfprune_launch.slurm.script import (
    ENVIRONMENT,
    Request,
    batch_script,
    environment_script,
    refuse_unusable_path,
    write_submission,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_stages import stage_of

from hfprune_dist.errors import UserError
from hfprune_dist.store.stage import Input

STAGE = stage_of("importance", "a", {}, {"model": Input("digest", "/somewhere")})
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >{folder}/arguments
env -0 >{folder}/environment
"""


def request(folder, **resources):
    return Request(
        stage=STAGE,
        resources=Resources(**resources),
        folder=folder / "attempt",
        job_name="hfprune-test",
        snapshot=folder / "code",
        threads=3,
    )


@pytest.fixture
def run(tmp_path):
    """Run a batch script as Slurm does; ``ranks`` is the environment in which srun was called, None if it was not."""

    def start(leaked=None, /, srun="", has_code=True, **resources):
        folder = tmp_path / "job"
        (folder / "bin").mkdir(parents=True)
        (folder / "attempt").mkdir()
        if has_code:
            (folder / "code").mkdir()
        (folder / "bin" / "srun").write_text(SRUN.format(folder=shlex.quote(str(folder))) + srun)
        (folder / "bin" / "srun").chmod(0o755)
        script = folder / "slurm_script"
        asked = request(folder, **resources)
        script.write_text(batch_script(asked))
        (folder / "attempt" / ENVIRONMENT).write_text(environment_script(asked))
        result = subprocess.run(
            ["bash", str(script)],
            env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", **(leaked or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        ranks = None
        if (folder / "environment").exists():
            ranks = dict(item.split("=", 1) for item in (folder / "environment").read_text().split("\0") if item)
        records = [file.read_text().strip() for file in (folder / "attempt").glob("exit.*")]
        return SimpleNamespace(code=result.returncode, said=result.stderr, ranks=ranks, records=records)

    return start


def test_a_profile_may_set_what_srun_takes(run):
    result = run(
        {"SLURM_CLUSTERS": "here"}, setup=["export SLURM_CPU_BIND=none"], environment={"SLURM_MPI_TYPE": "none"}
    )
    assert "SLURM_CLUSTERS" not in result.ranks
    assert result.ranks["SLURM_CPU_BIND"] == "none" and result.ranks["SLURM_MPI_TYPE"] == "none"
    assert result.said.startswith("hfprune: start 0\n")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("module load cuda/99", 127),
        ("loader() { false; return 3; }; loader cuda", 3),
    ],
)
def test_a_setup_line_that_fails_ends_the_job_and_is_named(run, line, code):
    result = run(setup=["true", line, "echo never >&2"])
    assert result.ranks is None and result.code == code
    assert result.records == [f"{code} setup in the profile failed in its line 2"] and "never" not in result.said


def test_a_setup_line_that_exits_ends_the_job_and_is_recorded(run):
    result = run(setup=["true", "false || exit 3"])
    assert result.ranks is None and result.code == 1
    assert result.records == ["1 a line of setup in the profile ended the job"]


def test_what_may_fail_in_a_setup(run, tmp_path):
    sourced = tmp_path / "profile.sh"
    sourced.write_text("false\nls /no/such/file\nexport FROM_FILE=1\n")
    result = run(
        setup=[
            f"source {sourced}",
            "loader() { false; export FROM_FUNCTION=1; }",
            "loader",
            "if false; then",
            "  export NEVER=1",
            "fi",
            "false || true",
            "[ -n '' ] && echo",
            "export MANY='several\nlines'",
        ]
    )
    assert result.code == 0, result.said
    assert {"FROM_FILE", "FROM_FUNCTION", "MANY"} <= result.ranks.keys() and "NEVER" not in result.ranks
    assert result.records == ["0"]


def test_a_copy_of_the_code_that_was_removed_is_what_it_is(run):
    result = run(has_code=False)
    assert result.ranks is None and "the copy of the code in" in result.records[0] and "gone" in result.records[0]


def test_the_exit_code_of_the_ranks_is_recorded(run):
    result = run(srun="exit 137")
    assert result.code == 137 and result.records == ["137"]


def test_values_of_a_profile_are_for_its_owner_alone(run, tmp_path):
    asked = request(tmp_path, setup=["export FIRST=secret-1"], environment={"HF_TOKEN": "secret-2"})
    asked.folder.mkdir()
    script = write_submission(asked)
    assert "secret" not in script.read_text()
    assert [file.name for file in asked.folder.iterdir() if "secret" in file.read_text(errors="replace")] == [
        ENVIRONMENT
    ]
    assert (asked.folder / ENVIRONMENT).stat().st_mode & 0o777 == 0o600
    ranks = run(setup=asked.resources.setup, environment=asked.resources.environment).ranks
    assert (ranks["FIRST"], ranks["HF_TOKEN"]) == ("secret-1", "secret-2")


# Characters that people have in paths: names that are not refused must reach the ranks unchanged.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")
)


@given(name=NAMES)
@example('it\'s a "test" $HOME `id` #1 ~ & ; * Größe 模型')
@settings(max_examples=40)
def test_paths_reach_the_ranks_as_they_are_or_are_refused(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("paths") / name
    try:
        refuse_unusable_path(folder)
    except UserError as error:
        assert repr(str(folder)) in str(error)
        assert any(character in "%\\:" or unicodedata.category(character) == "Cc" for character in name)
        return
    script = batch_script(request(folder))
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    words = shlex.split(srun)
    assert words[words.index("--output") + 1] == str(folder / "attempt" / "%j_%t_log.out")
    assert words[-1] == str(folder / "attempt")
    assert f"export HFPRUNE_CODE={shlex.quote(str(folder / 'code'))}\n" in script


@pytest.mark.parametrize("name", ["50%", "two\nlines"])
def test_a_path_that_jobs_can_not_have_is_refused_before_anything_is_written(config, tmp_path, name, capsys):
    out = tmp_path / name / "out"
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["--config", str(config), "--out", str(out), "--profile", "local-cluster"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out {str(out)!r}: ") and said.count("\n") == 1
    assert not out.parent.exists()

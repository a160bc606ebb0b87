"""The batch script, run by bash with a fake srun: what reaches the ranks, and what ends the job before they start."""

import os
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from hfprune_launch import sweep
from hfprune_launch.slurm.profile import Resources
from hfprune_launch.slurm.script import (
    ENVIRONMENT,
    JobRequest,
    batch_script,
    environment_script,
    write_submission,
)

SRUN = """#!/bin/bash
[[ $* = *" --nodes=1 --ntasks=1 "* ]] && alone=" alone"
echo "srun ${{@: -1}}$alone" >>{folder}/commands
env -0 >{folder}/environment
"""


def request(folder, stages=("attempt",), **resources):
    return JobRequest(
        resources=Resources(**resources),
        folders=[folder / stage for stage in stages],
        name="hfprune-test",
        snapshot=folder / "code",
        threads=3,
    )


@pytest.fixture
def run(tmp_path):
    """Run a batch script as Slurm does; ``ranks`` is the environment in which srun was called, None if it was not."""

    def start(leaked=None, /, srun="", has_code=True, stages=("attempt",), **resources):
        folder = tmp_path / 'it\'s a "test" $HOME `id` #1 ~ & ; * Größe 模型'
        for name in ("bin", *stages, *["code"] * has_code):
            (folder / name).mkdir(parents=True, exist_ok=True)
        quoted = shlex.quote(str(folder))
        (folder / "bin" / "srun").write_text(SRUN.format(folder=quoted) + srun)
        (folder / "bin" / "scontrol").write_text(f"#!/bin/bash\necho scontrol $* >>{quoted}/commands\n")
        for name in ("srun", "scontrol"):
            (folder / "bin" / name).chmod(0o755)
        script = folder / "slurm_script"
        asked = request(folder, stages, **resources)
        script.write_text(batch_script(asked))
        (folder / stages[0] / ENVIRONMENT).write_text(environment_script(asked))
        result = subprocess.run(
            ["bash", str(script)],
            env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", **(leaked or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        left, ranks = folder / "environment", None
        if left.exists():
            ranks = dict(item.split("=", 1) for item in left.read_text().split("\0") if item)
            assert ranks["PYTHONPATH"] == str(folder / "code")
        records = {str(file.relative_to(folder)): file.read_text().strip() for file in folder.glob("*/exit.*")}
        commands = (folder / "commands").read_text().replace(f"{folder}/", "").split("\n")[:-1] if ranks else []
        ended = {"code": result.returncode, "said": result.stderr, "records": records}
        return SimpleNamespace(**ended, ranks=ranks, commands=commands)

    return start


@pytest.mark.parametrize(
    ("line", "record"),
    [
        ("module load cuda/99", "127 setup in the profile failed in its line 2"),
        ("loader() { false; return 3; }; loader cuda", "3 setup in the profile failed in its line 2"),
        ("false || exit 3", "1 a line of setup in the profile ended the job"),
    ],
)
def test_a_setup_line_that_fails_ends_the_job_and_is_named(run, line, record):
    result = run(setup=["true", line, "echo never >&2"])
    assert result.ranks is None and result.code == int(record.split()[0]) and "never" not in result.said
    assert result.records == {"attempt/exit.5.0": record}


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
            "[ -n '' ] && echo",
            "export MANY='several\nlines'",
            "set -eu",
        ]
    )
    assert result.code == 0, result.said
    assert {"FROM_FILE", "FROM_FUNCTION", "MANY"} <= result.ranks.keys() and "NEVER" not in result.ranks
    assert result.records == {"attempt/exit.5.0": "0"}


def test_a_copy_of_the_code_that_was_removed_is_what_it_is(run):
    result = run(has_code=False)
    assert result.ranks is None and "the copy of the code in" in result.records["attempt/exit.5.0"]


FAILS_AT_B = 'case "${@: -1}" in */b) exit 137 ;; esac'


def test_a_chain_ends_at_the_first_stage_that_fails_and_goes_on_there(run):
    result = run(srun=FAILS_AT_B, stages="abc")
    assert result.code == 137 and result.commands == ["srun a", "srun b"]
    assert result.records == {"a/exit.5.0": "0", "b/exit.5.0": "137"}
    result = run({"SLURM_RESTART_COUNT": "1"}, stages="abc")
    assert result.code == 0 and result.commands[2:] == ["srun b", "srun c"]
    assert result.records["b/exit.5.1"] == result.records["c/exit.5.1"] == "0" and "a/exit.5.1" not in result.records
    result = run({"SLURM_RESTART_COUNT": "2"}, stages="abc")
    assert result.code == 0 and len(result.commands) == 4, "nothing is left to do"
    result = run({"SLURM_RESTART_COUNT": "3"}, stages="abcd", setup=["exit 3"])
    assert result.records["d/exit.5.3"].startswith("1 "), "told of the stage that is next"


def test_efficiency_runs_on_one_rank_of_its_jobs(run):
    result = run(stages=("recover/x/1", "efficiency/x/1"), nodes=2, tasks_per_node=4)
    assert result.commands == ["srun recover/x/1", "srun efficiency/x/1 alone"]


# Its second call has no answer, the last one of "c" another end; nobody sleeps.
UNANSWERED = """
printf "#!/bin/sh\n" >"${0%srun}sleep"; chmod +x "${0%srun}sleep"
case $(wc -l <"${0%bin/srun}commands") in 2 | 4) ;; 5) exit 9 ;; *) exit 0 ;; esac
echo "srun: error: Unable to confirm allocation for job 5: Unable to contact slurm controller (connect failure)" >&2
[ $(wc -l <"${0%bin/srun}commands") = 4 ] || echo "srun: Check SLURM_JOB_ID. Expired or invalid job 5" >&2
exit 1
"""


def test_a_chain_waits_for_a_controller_that_restarts_between_two_stages(run):
    result = run(srun=UNANSWERED, stages="abc")
    assert result.commands == ["srun a", "srun b", "srun b", "srun c", "srun c"]
    assert result.records == {"a/exit.5.0": "0", "b/exit.5.0": "0", "c/exit.5.0": "9"}, "what its first try said is old"


def test_a_chain_begins_no_stage_after_the_signal_before_its_time_limit(run):
    result = run(srun="sleep 1", stages="ab", time_minutes=1, signal_seconds=60)
    assert result.code == 1 and result.commands == ["srun a", "scontrol requeue 5"]
    result = run({"SLURM_RESTART_COUNT": "1"}, stages="ab", time_minutes=1, signal_seconds=60)
    assert result.code == 0 and result.commands[2:] == ["srun b"]


def test_a_chain_whose_next_ranks_do_not_hear_the_signal_yet_goes_on_with_them(run):
    """But not for ever, if they need more time than there is."""
    fails = FAILS_AT_B.replace("137", "140")
    result = run(srun=fails, stages="abc")
    assert result.code == 1 and result.commands == ["srun a", "srun b", "scontrol requeue 5"]
    result = run({"SLURM_RESTART_COUNT": "1"}, srun=fails, stages="abc")
    assert result.code == 140 and result.commands[3:] == ["srun b"] and result.records["b/exit.5.1"] == "140"


def test_values_of_a_profile_are_for_its_owner_alone(run, tmp_path):
    asked = request(tmp_path, setup=["export SLURM_CPU_BIND=secret-1"], environment={"HF_TOKEN": "secret-2"})
    (folder,) = asked.folders
    folder.mkdir()
    script = write_submission(asked)
    assert "secret" not in script.read_text()
    assert [file.name for file in folder.iterdir() if "secret" in file.read_text(errors="replace")] == [ENVIRONMENT]
    assert (folder / ENVIRONMENT).stat().st_mode & 0o777 == 0o600
    result = run({"SLURM_CLUSTERS": "x"}, setup=asked.resources.setup, environment=asked.resources.environment)
    assert (result.ranks["SLURM_CPU_BIND"], result.ranks["HF_TOKEN"]) == ("secret-1", "secret-2")
    assert "SLURM_CLUSTERS" not in result.ranks and result.said.startswith("hfprune: start 0\n")


def test_a_path_that_jobs_can_not_have_is_refused_before_anything_is_written(config, tmp_path, capsys):
    out = tmp_path / "50%" / "out"
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["--config", str(config), "--out", str(out), "--profile", "local-cluster"])
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out {str(out)!r}: ") and said.count("\n") == 1
    assert not out.parent.exists()

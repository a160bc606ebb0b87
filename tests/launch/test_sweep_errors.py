"""Damaged input: one clear message, exit code 2, no traceback, nothing written."""

import pytest
from hfprune_launch import sweep
from sweeps import in_process, make_inputs
from sweeps import sweep as started


def refused(config, out, *arguments):
    code, shown, said = in_process(sweep.main, "--config", config, "--out", out, *arguments)
    assert code == 2, shown + said
    assert "Traceback" not in said
    assert not out.exists(), "nothing is written"
    return said


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--models", "LAMA"], ["unknown model 'LAMA'; did you mean 'llama'?", "folder of a Hugging Face checkpoint"]),
        (["--models", ""], ["--models", "one or more values"]),
        (["--ratios", ""], ["--ratios", "one or more values"]),
        (["--ratios", "0"], ["ratios.0", "greater than 0"]),
        (["--ratios", "1.5"], ["ratios.0", "less than 1"]),
        (["--ratios", "0.9"], ["ratio 0.9", "largest possible is 0.2783"]),
        (["--ratios", "0.1,0.1"], ["ratios", "listed twice"]),
        (["--ratios", "0.2,0.20000001"], ["ratios", "both called 0.2"]),
        (["--ratios", "a lot"], ["--ratios 'a lot'"]),
        (["--set", "calibration.sample=3"], ["unknown key 'calibration.sample'", "did you mean 'samples'"]),
        (["--set", "calibration.samples=few"], ["calibration.samples", "whole number"]),
        (["--set", "samples"], ["--set 'samples'", "key=value"]),
        (["--set", "calibration.path=nowhere.jsonl"], ["nowhere.jsonl", "No such file"]),
        (["--set", "calibration.name=2024-13-45"], ["2024-13-45", "not a YAML value", "month"]),
        (["--set", "calibration={samples: 3, samples: 4}"], ["the key 'samples' appears twice"]),
        (["--set", "calibration.dataset=wikitext"], ["path (", "dataset (wikitext)", "set one of them to null"]),
        (["--set", "recovery.learning_rate=.inf"], ["recovery.learning_rate", "finite"]),
        (["--set", "seed=5000000000"], ["seed", "less than"]),
        (["--set", "calibration.text_field=txt"], ["calibration.jsonl", "'txt'", "the record has text"]),
        (["--set", "recovery.instruction_field=instrction"], ["'instrction'", "the record has instruction, response"]),
        (["--set", "recovery.batch_size=5"], ["recovery.batch_size 5", "2 ranks", "set batch_size to 4 or 6"]),
        (["--models", "x", "--set", "aliases={x: {hub_id: a/b/c}}"], ["model 'x'", "a/b/c"]),
        (["--methods", "lorap", "--set", "prune.refit=dense"], ["lorap.yaml with prune.refit", "low_rank"]),
        (["--profile", "local-cluster", "--ranks", "2"], ["--ranks 2", "tasks_per_node"]),
        (["--cancel", "--dry-run"], ["--dry-run", "not allowed with", "--cancel"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["--ranks", "0"], ["runtime.ranks", "greater than or equal to 1"]),
        (["--max-running", "0"], ["--max-running 0", "at least 1"]),
    ],
)
def test_bad_arguments(config, tmp_path, arguments, expected):
    message = refused(config, tmp_path / "out", *arguments)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "model.safetensors"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\0" * 4), "header is damaged"),
        (lambda model: (model / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda model: (model / "config.json").write_text('{"model_type": "new"}'),
            "has no num_hidden_layers",
        ),
        (
            lambda model: (model / "config.json").write_text('{"model_type": "gpt2"}'),
            "'gpt2' is not supported: its matrices are transposed",
        ),
        (lambda model: [file.unlink() for file in model.glob("tokenizer*")], "no tokenizer"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, expected):
    config = make_inputs(tmp_path)
    damage(tmp_path / "alpha")
    assert expected in refused(config, tmp_path / "out")


def test_what_a_dry_run_shows_can_be_run(config, tmp_path):
    """A dry run refuses what stages would refuse after hours, too; test_preflight.py has more cases."""
    refusal = refused(config, tmp_path / "out", "--dry-run", "--set", "recovery.batch_size=5")
    assert "recovery.batch_size 5" in refusal


def test_a_truncated_checkpoint_tells_both_sizes(tmp_path):
    config = make_inputs(tmp_path)
    file = tmp_path / "beta" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "truncated" in refused(config, tmp_path / "out")


def test_an_unwritable_output_folder(config, tmp_path):
    (tmp_path / "file").write_text("")
    result = started(config, tmp_path / "file" / "out")
    assert result.returncode == 2 and "can't be written to" in result.stderr and "Traceback" not in result.stderr


def test_yaml_that_is_none(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text("models: [a\n")
    assert "not valid YAML" in refused(config, tmp_path / "out")


def test_help_names_every_flag():
    """It runs in a separate process, whereas everything else here runs in forks."""
    result = started(None, "unused", "--help", real=True)
    assert result.returncode == 0
    shared = ("--models", "--ratios", "--config", "--set", "--out", "--backend", "--ranks", "--criteria", "--dry-run")
    slurm = ("--profile", "--max-running", "--follow", "--status", "--cancel", "--logs")
    for flag in shared + slurm:
        assert flag in result.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(config, tmp_path):
    texts = [
        {"path": str(config.parent / "calibration.jsonl")},
        {"path": str(config.parent / "heldout.jsonl"), "weight": 3},
    ]
    mixed = ["--set", "calibration.path=null", "--set", f"calibration.mixture={texts}"]
    result = started(config, tmp_path / "out", "--dry-run", *mixed)
    assert result.returncode == 0 and not (tmp_path / "out").exists()
    assert "8 cells, 22 stages: 0 reuse, 22 run" in result.stdout
    assert result.stdout.count("not made yet") == 22
    assert f"calibration windows: 2 of {texts[0]['path']}, 6 of {texts[1]['path']}" in result.stdout

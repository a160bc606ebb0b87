"""A sweep that learns what the dense model answers, from planning to the card."""

import pytest
from sweeps import finish, in_process, make_inputs, results

from hfprune_dist.store.atomic_files import read_json


@pytest.mark.parametrize(("samples", "told"), [("null", "all"), (7, "up to 7")])
def test_a_dry_run_tells_how_many_instructions_are_answered(tmp_path, samples, told):
    from hfprune_launch.sweep import main

    given = {"answers": "dense", "sequence_length": 512, "samples": samples}
    settings = [word for name, value in given.items() for word in ("--set", f"recovery.{name}={value}")]
    named = ["--config", make_inputs(tmp_path), "--out", tmp_path / "out", "--models", "alpha"]
    code, shown, _ = in_process(main, *named, *settings, "--dry-run")
    assert code == 0 and f"note: alpha, the dense model, answers {told} instructions\n" in shown


@pytest.mark.slow
def test_rows_learn_the_dense_models_answers_and_say_so(tmp_path):
    settings = ["recovery.answers=dense", "recovery.sequence_length=512", "evaluation.tasks=[]"]
    arguments = ["--models", "alpha", "--ratios", "0.2", *(f"--set={setting}" for setting in settings)]
    finish(make_inputs(tmp_path), tmp_path / "out", *arguments)
    rows = {row["label"]: row for row in results(tmp_path / "out")}
    assert list(rows) == [
        "alpha dense",
        "alpha dense + lora-answers",
        "alpha 0.2 surgeon-uniform-block + lora-answers",
    ]
    assert float(rows["alpha dense + lora-answers"]["kl"]) > 0
    (answers,) = (tmp_path / "out" / "store" / "answers").iterdir()
    pairs = read_json(answers / "manifest.json")["metrics"]["pairs"]
    trained = [read_json(file) for file in (tmp_path / "out" / "store" / "recover").glob("*/manifest.json")]
    assert [(manifest["metrics"]["pairs"], pairs > 30) for manifest in trained] == [(pairs, True)] * 2
    card = tmp_path / "out" / "checkpoints" / "alpha-0.2-surgeon-uniform-block-lora-answers" / "README.md"
    told = "the file `pairs.jsonl`, its instructions answered by the base model in transformers "
    assert f"| trained on | {told}" in card.read_text()

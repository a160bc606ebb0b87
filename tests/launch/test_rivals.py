"""Rivals next to one of our methods: the same windows, one calibration pass, the same parameters removed, one table;
and, if every test is asked for, recovery of what has factors, and of what is pruned meanwhile.
"""

import pytest
from hfprune_launch import sweep as sweep_command
from sweeps import finish, in_process, make_inputs, results
from tiny import save_tiny

from hfprune_dist.store.atomic_files import read_json

pytestmark = pytest.mark.slow

RIVALS = ["wanda-sp", "llm-pruner", "flap", "sdmprune", "lorap"]

NO_TASKS = ["--set", "evaluation.tasks=[]"]  # windows of held-out text go through the same models


def arguments(ranks, ratios="0.2", methods=("hfprune", *RIVALS)):
    models = ["--models", "alpha", "--ratios", ratios, "--methods", ",".join(methods)]
    return [*models, "--set", f"runtime.ranks={ranks}", "--set", "recovery.method=none", *NO_TASKS]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Inputs whose model has nine layers; llm-pruner protects the first and the last."""
    folder = tmp_path_factory.mktemp("inputs")
    file = make_inputs(folder)
    for old in (folder / "alpha").iterdir():
        old.unlink()
    save_tiny(folder / "alpha", num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=4)
    return file


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(config, out, *arguments(1))
    return out


def folders_of(out, kind):
    return list((out / "store" / kind).iterdir())


def test_rivals_share_a_calibration_pass_and_remove_as_much(finished):
    """One rival needs another pass, in its student."""
    out = finished
    passes = [read_json(folder / "manifest.json") for folder in folders_of(out, "importance")]
    assert sorted(manifest["stage"]["params"]["criteria"] == ["coupled_taylor_distilled"] for manifest in passes) == [
        False,
        True,
    ]
    rows = {row["method"]: row for row in results(out)}
    assert set(rows) == {"", "hfprune", *RIVALS}
    biases = 2 * 9 * 32 / int(rows[""]["parameters"])  # which flap adds
    for name in RIVALS:
        expected = 0.2 - biases * (name == "flap")
        assert float(rows[name]["ratio_reached"]) == pytest.approx(expected, abs=2.5e-3)
        assert float(rows[name]["kl"]) > 0


def test_loraprune_alone_needs_no_calibration_and_what_it_can_not_do_is_refused(config, tmp_path):
    alone = ["--config", config, "--out", tmp_path / "out", "--models", "alpha", "--methods", "loraprune"]
    code, shown, said = in_process(sweep_command.main, *alone, "--ratios", "0.2", "--dry-run")
    assert code == 0, said
    kinds = [line.split()[0] for line in shown.splitlines() if line.endswith("not made yet")]
    assert "loraprune" in kinds and not {"importance", "prune"} & set(kinds)
    for setting, instead in {"method=none": "lora", "evaluate_every=1000": "null"}.items():
        code, _, said = in_process(sweep_command.main, *alone, "--ratios", "0.2", "--set", f"recovery.{setting}")
        told = " ".join(said.split())
        assert code == 2 and "--methods loraprune: units go while LoRA recovers the model" in told
        assert f"recovery.{setting.replace('=', ' is ')}; set it to {instead}" in told

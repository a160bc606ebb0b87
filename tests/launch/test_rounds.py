"""Pruning and training in turn: a sweep that goes by rounds, on tiny models."""

import json
import re

import pytest
from hfprune_launch.slurm.decide import StageState, to_submit
from hfprune_launch.slurm.observe import served_by
from ranks import killing
from sweeps import finish, in_process, loaded_by_its_card, planned, results, sweep

from hfprune_dist.checkpoints.checkpoint import open_checkpoint

FIRST, LAST = "alpha 0.1 {} + lora-distill", "alpha 0.2 {} + lora-distill via 0.1"


@pytest.mark.slow
def test_what_was_trained_is_scored_pruned_and_trained_again(config, tmp_path):
    """Towards the dense model; the ratio is a share of that one, too. A shape of its own and a plain one."""
    out, methods = tmp_path / "out", ["surgeon-any-shape", "surgeon-plain"]
    settings = ["prune.effort=quick", "recovery.objective=distill", "evaluation.tasks=[]", "runtime.ranks=1"]
    chosen = ["--models", "alpha", "--ratios", "0.1", "--methods", ",".join(methods)]
    chosen += [word for setting in settings for word in ("--set", setting)]
    finish(config, out, *chosen)
    rounds = [*chosen, "--set", "rounds=[0.1,0.2]"]
    killed = sweep(config, out, *rounds, environment=killing(0, 4, "work/recover"))
    assert killed.returncode == 1 and "8 of 17 stages to run" in killed.stdout
    finish(config, out, *rounds)

    rows = {row["label"]: row for row in results(out)}
    dense = open_checkpoint(config.parent / "alpha")
    stages = json.loads((out / "sweep.json").read_text())["stages"]
    stage_of = {(each["kind"], each["label"]): each for each in stages}
    for method in methods:
        first, last = (rows[label.format(method)] for label in (FIRST, LAST))
        assert (last["status"], last["recovery"], last["ratio"]) == ("done", "lora-distill via 0.1", "0.2")
        assert abs(float(last["ratio_reached"]) - 0.2) < 0.01 and int(last["training_tokens"]) > 0
        trained = stage_of["recover", FIRST.format(method)]
        for kind in ("importance", "prune"):
            source = stage_of[kind, LAST.format(method)]["inputs"]["model"]
            assert source["location"] == f"recover/{trained['fingerprint']}"
        taught = stage_of["recover", LAST.format(method)]["inputs"]["dense"]
        assert taught["identity"] == stage_of["importance", "alpha"]["inputs"]["model"]["identity"]
        model = loaded_by_its_card(out / last["checkpoint"])["model"]
        left = sum(weight.numel() for weight in model.parameters())
        assert (
            left == int(last["parameters"]) == dense.parameters - round(float(last["ratio_reached"]) * dense.parameters)
        )
        assert int(last["training_tokens"]) == 2 * int(first["training_tokens"]) and left < int(first["parameters"])
        card = (out / last["checkpoint"] / "README.md").read_text()
        told = "it was fine-tuned with LoRA towards `alpha`'s own predictions to recover after each round"
        assert f"in rounds: 10% went first, and {told}" in card
        cut = stage_of["prune", LAST.format(method)]["fingerprint"]
        assert re.search(f"the pruned model before it, which .* leaves in its sweep's `store/prune/{cut}`", card)
    assert "- via: first pruned and trained at these ratios" in (out / "results.md").read_text()


@pytest.mark.slow
def test_rounds_too_close_to_each_other_are_told_by_the_stage(config, tmp_path):
    few = ["--models", "alpha", "--ratios", "0.1", "--methods", "hfprune", "--set", "prune.multiple_of=16"]
    few += ["--set", "rounds=[0.1,0.104]", "--set", "evaluation.tasks=[]", "--ranks", "1"]
    result = sweep(config, tmp_path / "out", *few)
    assert result.returncode == 2, result.stdout
    # With a multiple of 16, 9.4768 % are gone: 1 - (1 - 0.104) / (1 - 0.094768).
    left = "via 0.1, as a share of what the round before left: ratio 0.0101985 can't be reached"
    assert left in result.stdout


def test_a_dry_run_shows_the_stages_and_a_job_runs_a_round_at_a_time(config, tmp_path):
    from hfprune_launch.sweep import main

    few = ["--models", "alpha", "--methods", "hfprune", "--set", "rounds=[0.1,0.15,0.2]", "--set", "ratios=[0.1]"]
    code, shown, _ = in_process(main, "--config", config, "--out", tmp_path / "out", *few, "--dry-run")
    assert code == 0 and re.search(r"importance +alpha 0.2 hfprune \+ lora via 0.1, 0.15 +\w+ +run", shown)
    assert "0.2 of the dense model, from what 0.15 leaves" in shown
    _, plan = planned(config, models=["alpha"], methods=["hfprune"], ratios=[0.1], rounds=[0.1, 0.15, 0.2])
    serves = served_by(plan)
    states = {key: StageState(key, tuple(each.needs), serves[key], True, False) for key, each in plan.stages.items()}
    jobs = [[(plan.stages[key].kind, plan.stages[key].label) for key in job] for job in to_submit(states, lambda _: 1)]
    last = "alpha 0.2 hfprune + lora via 0.1, 0.15"
    assert jobs[-1][-4:] == [(kind, last) for kind in ("importance", "prune", "recover", "evaluate")]
    assert [("prune", "alpha 0.1 hfprune"), ("recover", "alpha 0.1 hfprune + lora")] in jobs


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["--methods", "loraprune"], "rounds: method 'loraprune' can't go by rounds: it prunes while it trains"),
        (["--methods", "lorap"], "rounds: method 'lorap' can't go by rounds: matrices of low rank"),
        (["--methods", "sdmprune"], "rounds: method 'sdmprune' can't go by rounds: its student lacks a share"),
        (["--set", "recovery.method=none"], "rounds: nothing is trained between them"),
        (["--set", "rounds=[0.2,0.1]"], "two or more ascending ratios"),
        (["--set", "rounds=[0.1,0.9]"], "ratio 0.9 can't be reached"),
    ],
)
def test_what_rounds_can_not_do_is_one_message(config, tmp_path, settings, told):
    from hfprune_launch.sweep import main

    files = ["--config", config, "--out", tmp_path / "out", "--set", "rounds=[0.1,0.2]"]
    code, _, said = in_process(main, *files, *settings)
    assert code == 2 and told in said and said.count("error") == 1

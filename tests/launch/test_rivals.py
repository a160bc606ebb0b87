"""Rivals beside a method of ours: the same windows, one calibration pass, the same parameters removed, one table."""

import pytest
from hfprune_launch import sweep as sweep_command
from sweeps import artifacts, finish, in_process, make_inputs, results, without_costs
from tiny import save_tiny
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

RIVALS = ["wanda-sp", "llm-pruner"]


def arguments(ranks):
    models = ["--models", "alpha", "--ratios", "0.2", "--methods", ",".join(["hfprune", *RIVALS])]
    return [*models, "--set", f"runtime.ranks={ranks}", "--set", "recovery.method=none"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of nine layers, llm-pruner protects the first and the last."""
    folder = tmp_path_factory.mktemp("inputs")
    file = make_inputs(folder)
    for old in (folder / "alpha").iterdir():
        old.unlink()
    save_tiny(folder / "alpha", num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=4)
    return file


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    outs = [tmp_path_factory.mktemp("finished") / str(ranks) for ranks in (1, 2)]
    for ranks, out in enumerate(outs, start=1):
        finish(config, out, *arguments(ranks))
    return outs


def test_rivals_share_a_calibration_pass_and_remove_as_much(finished):
    out = finished[0]
    assert len(list((out / "store" / "importance").iterdir())) == 1
    rows = {row["method"]: row for row in results(out)}
    assert set(rows) == {"", "hfprune", *RIVALS}
    for name in RIVALS:
        assert float(rows[name]["ratio_reached"]) == pytest.approx(0.2, abs=2e-3)
        assert float(rows[name]["kl"]) > 0


def test_any_number_of_ranks_makes_the_same_scores_checkpoints_and_rows(finished):
    one, two = finished
    for kind in ("importance", "prune"):
        assert artifacts(one, kind) == artifacts(two, kind)
    rows = ([without_costs(row) | {"checkpoint": ""} for row in results(out)] for out in finished)
    assert next(rows) == next(rows)


def test_wanda_sp_loads_everywhere_and_llm_pruner_where_layers_may_differ(finished):
    plain = {}
    for folder in (finished[0] / "store" / "prune").iterdir():
        config = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).config
        plain[folder.name] = not getattr(config, "layer_sizes", None)
    assert sorted(plain.values()) == [False, True, True]


def test_a_dry_run_shows_the_shapes_of_both(config, tmp_path):
    code, shown, said = in_process(
        sweep_command.main, "--config", config, "--out", tmp_path / "out", *arguments(1), "--dry-run"
    )
    assert code == 0, said
    for name in RIVALS:
        (line,) = [it.split() for it in shown.splitlines() if it.startswith(f"alpha 0.2 {name} ")]
        width, heads, layers, reached = line[3:]
        assert layers == "9" and float(reached) == pytest.approx(0.2, abs=2e-3)
        assert ("-" in width, "-" in heads) == (name == "llm-pruner",) * 2, "protected layers keep all"


def test_a_ratio_out_of_reach_is_refused_with_the_largest_that_is_not(config, tmp_path):
    out = tmp_path / "out"
    code, _, said = in_process(
        sweep_command.main,
        "--config",
        config,
        "--out",
        out,
        "--methods",
        "llm-pruner",
        "--models",
        "alpha",
        "--ratios",
        "0.9",
    )
    assert code == 2 and "can't be reached by pruning neurons and kv_groups with the layers that" in " ".join(
        said.split()
    )
    assert "the largest possible is 0." in " ".join(said.split()) and not out.exists()


OWN = ["--models", "alpha", "--ratios", "0.2", "--methods", "hfprune,loraprune", "--set", "runtime.ranks=1"]


@pytest.fixture(scope="module")
def recovered(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("recovered") / "out"
    finish(config, out, *OWN)
    return out


def test_loraprune_is_a_row_whose_recovery_is_its_own(config, recovered):
    rows = {row["method"]: row for row in results(recovered) if row["recovery"] != "none"}
    assert {name: row["recovery"] for name, row in rows.items()} == {"": "lora", "hfprune": "lora", "loraprune": "own"}
    row = rows["loraprune"]
    assert float(row["ratio_reached"]) == pytest.approx(0.2, abs=2e-3) and float(row["kl"]) > 0
    assert row["criterion"] == row["average_of_dense_before_recovery"] == row["training/importance/flops"] == ""
    assert float(row["training/loraprune/flops"]) > float(rows[""]["training/recover/flops"])
    assert float(row["training/loraprune/tokens"]) == float(rows[""]["training/recover/tokens"])
    again = finish(config, recovered, *OWN)
    assert "stages to run" not in again.stdout and "recovery own: " in again.stdout


def test_its_checkpoint_loads_and_its_card_says_how_it_was_made(recovered):
    folder = recovered / "checkpoints" / "alpha-0.2-loraprune"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths[0] == widths[-1] == 48 > max(widths[1:-1]) == min(widths[1:-1])
    card = (folder / "README.md").read_text()
    assert "pruned by the method `loraprune`, while it was fine-tuned with LoRA to recover." in card
    assert "neurons and kv groups go, scored by LoRA's own gradients" in card and "stage: loraprune" in card
    assert "as an adapter of the base model, from before units were cut" in card and "calibration |" not in card
    assert "alpha/" not in card and "alpha" in (folder / "adapter" / "adapter_config.json").read_text()
    page = (recovered / "report.html").read_text()
    assert "loss of recovery that prunes" in page and "loraprune + own" not in page


def test_loraprune_alone_needs_no_calibration_and_recovery_none_is_refused(config, tmp_path):
    alone = ["--config", config, "--out", tmp_path / "out", *OWN, "--methods", "loraprune"]
    code, shown, said = in_process(sweep_command.main, *alone, "--dry-run")
    assert code == 0, said
    kinds = [line.split()[0] for line in shown.splitlines() if line.endswith("not made yet")]
    assert "loraprune" in kinds and not {"importance", "prune"} & set(kinds)
    (line,) = [it.split() for it in shown.splitlines() if it.startswith("alpha 0.2 ") and "-48" in it]
    assert float(line[-1]) == pytest.approx(0.2, abs=2e-3)
    for dry in ([], ["--dry-run"]):
        code, _, said = in_process(sweep_command.main, *alone, "--set", "recovery.method=none", *dry)
        assert code == 2 and "--methods loraprune: units go while LoRA recovers the model" in " ".join(said.split())
    code, _, said = in_process(sweep_command.main, *alone, "--ratios", "0.9")
    assert code == 2 and "the largest possible is 0." in " ".join(said.split()) and not (tmp_path / "out").exists()

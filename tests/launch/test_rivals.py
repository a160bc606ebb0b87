"""Rivals next to one of our methods: the same windows, one calibration pass, the same parameters removed, one table."""

import shutil

import pytest
import torch
from hfprune_launch import sweep as sweep_command
from masking import read_kept
from ranks import assert_close_files
from safetensors.torch import load_file
from sweeps import artifacts, begin_with, finish, in_process, make_inputs, results, without_costs
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.data.windows import load_windows
from hfprune_dist.methods.sdmprune import student_keeps
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.store.atomic_files import read_json

pytestmark = pytest.mark.slow

RIVALS = ["wanda-sp", "llm-pruner", "flap", "sdmprune", "lorap"]

ALONE = ["--models", "alpha", "--methods", "loraprune", "--set", "runtime.ranks=1"]
OWN = [*ALONE, "--ratios", "0.2", "--methods", "hfprune"]
FEW_STEPS = ["--set", "recovery.max_steps=2"]
NO_TASKS = ["--set", "evaluation.tasks=[]"]  # windows of held-out text go through the same models
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"]
EFFICIENCY = [
    word
    for setting in ("batch_sizes=[1]", "prompt_tokens=[8]", "new_tokens=4", "repeats=1", "dtype=float32")
    for word in ("--set", f"efficiency.{setting}")
]


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
    """One sweep on one rank and one on two, which evaluates nothing again: stages/test_evaluate.py compares that."""
    outs = one, two = [tmp_path_factory.mktemp("finished") / str(ranks) for ranks in (1, 2)]
    finish(config, one, *arguments(1))
    begin_with(two, one, "reference", "evaluate")
    finish(config, two, *arguments(2))
    return outs


def folders_of(out, kind):
    return list((out / "store" / kind).iterdir())


def test_rivals_share_a_calibration_pass_and_remove_as_much(finished):
    """One rival needs another pass, in its student."""
    out = finished[0]
    passes = [read_json(it / "manifest.json") for it in folders_of(out, "importance")]
    assert sorted(it["stage"]["params"]["criteria"] == ["coupled_taylor_distilled"] for it in passes) == [False, True]
    rows = {row["method"]: row for row in results(out)}
    assert set(rows) == {"", "hfprune", *RIVALS}
    biases = 2 * 9 * 32 / int(rows[""]["parameters"])  # which flap adds
    for name in RIVALS:
        expected = 0.2 - biases * (name == "flap")
        assert float(rows[name]["ratio_reached"]) == pytest.approx(expected, abs=2.5e-3)
        assert float(rows[name]["kl"]) > 0


def test_any_number_of_ranks_makes_the_same_scores_checkpoints_and_rows(finished):
    one, two = finished
    assert artifacts(one, "prune") == artifacts(two, "prune")
    assert_close_files(artifacts(one, "importance"), artifacts(two, "importance"))
    rows = ([without_costs(row) | {"checkpoint": ""} for row in results(out)] for out in finished)
    assert next(rows) == next(rows)


def test_wanda_sp_loads_everywhere_and_the_others_where_layers_may_differ(finished):
    plain, biased = {}, {}
    for folder in folders_of(finished[0], "prune"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        plain[folder.name] = not getattr(model.config, "layer_sizes", None)
        biased[folder.name] = any(name.endswith("o_proj.bias") for name, _ in model.named_parameters())
        ids = torch.arange(12)[None] + 3
        with torch.no_grad():
            assert torch.equal(model(ids).logits, load_causal_lm(folder, torch.float32)(ids).logits)
    assert sorted(plain.values()) == [False, False, False, True, True, True]
    assert [not plain[name] for name, has_biases in biased.items() if has_biases] == [True], "flap's alone"


def test_flap_is_recovered_and_its_biases_stay(config, finished, tmp_path):
    """It starts from the artifacts of a sweep without recovery; on two ranks, weights and biases are sharded."""
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "store", out / "store")
    method = ["--models", "alpha", "--ratios", "0.2", "--methods", "flap", "--set", "runtime.ranks=2"]
    sharded = ["--set", "recovery.method=lora", "--set", "runtime.sharding=zero3"]
    finish(config, out, *method, *FEW_STEPS, *NO_TASKS, *sharded)
    (row,) = [it for it in results(out) if it["method"] == "flap"]
    (pruned,) = [it for it in results(finished[0]) if it["method"] == "flap"]
    assert row["parameters"] == pruned["parameters"] and row["kl"] != pruned["kl"]
    places = {finished[0]: pruned, out: row}
    before, after = (load_file(at / it["checkpoint"] / "model.safetensors") for at, it in places.items())
    biases = {name for name in before if name.endswith(("o_proj.bias", "down_proj.bias"))}
    assert len(biases) == 2 * 9 and all(torch.equal(before[name], after[name]) for name in biases)
    assert not torch.equal(*(it["model.layers.0.mlp.down_proj.weight"] for it in (before, after)))


def test_what_the_student_lacks_goes_first_and_numbers_are_the_dense_models(finished):
    out = finished[0]
    scores = {}
    for folder in folders_of(out, "importance"):
        scores |= load_file(folder / "importance.safetensors")
    pruned = {read_json(it / "manifest.json")["stage"]["params"]["criterion"]: it for it in folders_of(out, "prune")}
    kept = read_kept(pruned["coupled_taylor_distilled"])
    for layer in range(9):
        first, second = (scores[f"layers.{layer}.{name}"] for name in ("coupled_taylor", "coupled_taylor_distilled"))
        numbers = kept.of_layer(layer, "neurons")
        assert not second[~student_keeps(first, 0.025)].any()
        assert second[numbers].min() >= second[~torch.isin(torch.arange(len(second)), numbers)].max()


def test_other_ratios_take_up_the_first_pass_and_those_nearby_the_students(config, finished, tmp_path):
    """Published settings of the student differ at 30 %, and not at 25 %."""

    def passes(asked):
        given = ["--config", config, "--out", finished[0], *asked, "--dry-run"]
        code, shown, said = in_process(sweep_command.main, *given)
        assert code == 0, said
        lines = [it.split() for it in shown.splitlines() if it.startswith("importance ")]
        return sorted("reuse" in it for it in lines)

    assert passes(arguments(1, "0.2,0.3")) == [False, True, True]
    assert passes(arguments(1, "0.2,0.25")) == [True, True]


def test_a_dry_run_shows_the_shapes_of_all(config, tmp_path):
    code, shown, said = in_process(
        sweep_command.main, "--config", config, "--out", tmp_path / "out", *arguments(1), "--dry-run"
    )
    assert code == 0, said
    for name in RIVALS:
        (line,) = [it.split() for it in shown.splitlines() if it.startswith(f"alpha 0.2 {name} ")]
        if name == "flap":
            assert "scores decide, layer by layer" in " ".join(line)
            continue
        width, heads, layers, reached = line[3:7]  # lorap has its ranks behind
        assert layers == "9" and float(reached) == pytest.approx(0.2, abs=2.5e-3)
        assert ("-" in width, "-" in heads) == (name == "llm-pruner",) * 2, "protected layers keep all"


@pytest.mark.parametrize("method", ["llm-pruner", "lorap"])
def test_a_ratio_out_of_reach_is_refused_with_the_nearest_that_is_not(config, tmp_path, method):
    out = tmp_path / "out"
    asked = ["--config", config, "--out", out, "--methods", method, "--models", "alpha", "--ratios", "0.9"]
    code, _, said = in_process(sweep_command.main, *asked)
    told = " ".join(said.split())
    assert code == 2 and "can't be reached by pruning neurons" in told
    assert "the nearest possible is 0." in told and not out.exists()


@pytest.fixture(scope="module")
def recovered(config, tmp_path_factory):
    """A sweep with no other method, so that no criterion needs the calibration pass; weights are sharded."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    asked = ["--models", "alpha", "--ratios", "0.4", "--methods", "lorap", "--set", "efficiency.enabled=true"]
    sharded = [*FEW_STEPS, *NO_TASKS, "--set", "runtime.sharding=zero3"]
    finish(config, out, *asked, *EFFICIENCY, *sharded)
    return out


def test_recovery_trains_both_factors_and_keeps_the_shape(recovered):
    (pruned,), (trained,) = (folders_with(recovered, kind, "layer_sizes") for kind in ("prune", "recover"))
    checkpoints = [open_checkpoint(folder) for folder in (pruned, trained)]
    assert checkpoints[0].ranks == checkpoints[1].ranks and set(checkpoints[0].ranks) == set(PROJECTIONS)
    assert checkpoints[0].parameters == checkpoints[1].parameters
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, trained))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    linear = {f"mlp.{it}_proj" for it in ("gate", "up", "down")}
    linear |= {f"{it}.{place}" for it in PROJECTIONS for place in "01"}
    assert changed == {f"model.layers.{layer}.{it}.weight" for layer in range(9) for it in linear}
    adapter = read_json(trained / "adapter" / "adapter_config.json")
    factors = ("q_proj.0", "q_proj.1", "o_proj.0", "o_proj.1")
    assert all(any(name.endswith(factor) for name in adapter["target_modules"]) for factor in factors)


def test_what_recovery_writes_loads_with_its_code_and_is_measured(recovered):
    (trained,) = folders_with(recovered, "recover", "layer_sizes")
    ids = torch.arange(3, 43)[None]
    remote = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(remote(ids).logits, load_causal_lm(trained, torch.float32)(ids).logits)
    (row,) = [row for row in results(recovered) if row["method"] == "lorap"]
    parameters = sum(it.numel() for it in remote.parameters())
    assert int(row["parameters"]) == parameters and float(row["kl"]) > 0 and float(row["decode_speed"]) > 0


def test_an_importance_artifact_without_scores_carries_the_windows(recovered):
    (folder,) = (recovered / "store" / "importance").iterdir()
    assert load_file(folder / "importance.safetensors") == {} and len(load_windows(folder)) == 8


def test_a_recovered_model_is_pruned_by_no_method(recovered, config, tmp_path):
    (trained,) = folders_with(recovered, "recover", "layer_sizes")
    asked = ["--config", config, "--out", tmp_path / "out", "--models", trained, "--ratios", "0.1"]
    code, _, said = in_process(sweep_command.main, *asked, "--methods", "hfprune")
    assert code == 2 and "its attention has matrices of low rank (q_proj_rank" in " ".join(said.split())


def folders_with(out, kind, field):
    """Return the artifacts of a kind of stage whose config.json has the field."""
    return [it for it in (out / "store" / kind).iterdir() if field in read_json(it / "config.json")]


@pytest.fixture(scope="module")
def pruned_in_recovery(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("own") / "out"
    finish(config, out, *OWN)
    return out


def test_loraprune_is_a_row_whose_recovery_is_its_own(config, pruned_in_recovery):
    rows = {row["method"]: row for row in results(pruned_in_recovery) if row["recovery"] != "none"}
    assert {name: row["recovery"] for name, row in rows.items()} == {"": "lora", "hfprune": "lora", "loraprune": "own"}
    row = rows["loraprune"]
    assert float(row["ratio_reached"]) == pytest.approx(0.2, abs=2e-3) and float(row["kl"]) > 0
    assert row["criterion"] == ""
    assert float(row["training_flops"]) == float(rows[""]["training_flops"]), "both train the dense model"
    assert float(row["training_tokens"]) == float(rows[""]["training_tokens"])
    again = finish(config, pruned_in_recovery, *OWN)
    assert "stages to run" not in again.stdout and "recovery own: " in again.stdout


def test_its_checkpoint_loads_and_its_card_says_how_it_was_made(pruned_in_recovery):
    folder = pruned_in_recovery / "checkpoints" / "alpha-0.2-loraprune"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths[0] == widths[-1] == 48 > max(widths[1:-1]) == min(widths[1:-1])
    card = (folder / "README.md").read_text()
    assert "pruned by the method `loraprune`, while it was fine-tuned with LoRA to recover." in card
    assert "adapter too, of the base model, `alpha`, a local checkpoint, before units were cut" in card
    assert "calibrated on" not in card
    assert "alpha/" not in card and "alpha" in (folder / "adapter" / "adapter_config.json").read_text()
    page = (pruned_in_recovery / "report.html").read_text()
    assert "loss of recovery that prunes" in page and "loraprune + own" not in page


def test_loraprune_alone_needs_no_calibration_and_recovery_none_is_refused(config, tmp_path):
    asked = ["--config", config, "--out", tmp_path / "out", *ALONE]
    alone = [*asked, "--ratios", "0.2"]
    code, shown, said = in_process(sweep_command.main, *alone, "--dry-run")
    assert code == 0, said
    kinds = [line.split()[0] for line in shown.splitlines() if line.endswith("not made yet")]
    assert "loraprune" in kinds and not {"importance", "prune"} & set(kinds)
    (line,) = [it.split() for it in shown.splitlines() if it.startswith("alpha 0.2 ") and "-48" in it]
    assert float(line[-1]) == pytest.approx(0.2, abs=2e-3)
    for dry in ([], ["--dry-run"]):
        code, _, said = in_process(sweep_command.main, *alone, "--set", "recovery.method=none", *dry)
        assert code == 2 and "--methods loraprune: units go while LoRA recovers the model" in " ".join(said.split())
    code, _, said = in_process(sweep_command.main, *asked, "--ratios", "0.9")
    assert code == 2 and "the nearest possible is 0." in " ".join(said.split()) and not (tmp_path / "out").exists()

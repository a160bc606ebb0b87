"""Rivals beside a method of ours: the same windows, one calibration pass, the same parameters removed, one table."""

import shutil
from pathlib import Path

import pytest
import torch
from hfprune_launch import sweep as sweep_command
from safetensors.torch import load_file
from sweeps import artifacts, finish, in_process, make_inputs, results, without_costs
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.kept_file import read_kept
from hfprune_dist.core.scores import student_keeps
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.store.atomic_files import read_json

pytestmark = pytest.mark.slow

RIVALS = ["wanda-sp", "llm-pruner", "flap", "sdmprune"]


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


def folders_of(out, kind):
    return list((out / "store" / kind).iterdir())


def test_rivals_share_a_calibration_pass_and_remove_as_much(finished):
    """And one has another, in its student."""
    out = finished[0]
    passes = [read_json(it / "manifest.json") for it in folders_of(out, "importance")]
    assert sorted(it["stage"]["params"]["criteria"] == ["coupled_taylor_distilled"] for it in passes) == [False, True]
    rows = {row["method"]: row for row in results(out)}
    assert set(rows) == {"", "hfprune", *RIVALS}
    biases = 2 * 9 * 32 / int(rows[""]["parameters"])  # which flap adds
    for name in RIVALS:
        expected = 0.2 - biases * (name == "flap")
        assert float(rows[name]["ratio_reached"]) == pytest.approx(expected, abs=2e-3)
        assert float(rows[name]["kl"]) > 0


def test_any_number_of_ranks_makes_the_same_scores_checkpoints_and_rows(finished):
    one, two = finished
    for kind in ("importance", "prune"):
        assert artifacts(one, kind) == artifacts(two, kind)
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
    assert sorted(plain.values()) == [False, False, True, True, True]
    assert [not plain[name] for name, has_biases in biased.items() if has_biases] == [True], "flap's alone"


@pytest.mark.parametrize("ranks", [1, 2])
def test_flap_is_recovered_and_its_biases_stay(config, finished, tmp_path, ranks):
    """From the artifacts of a sweep without recovery; on two ranks weights, biases among them, are sharded."""
    out = tmp_path / "out"
    shutil.copytree(finished[0] / "store", out / "store")
    method = ["--models", "alpha", "--ratios", "0.2", "--methods", "flap", "--set", f"runtime.ranks={ranks}"]
    finish(config, out, *method, "--set", "recovery.method=lora", "--set", "runtime.sharding=zero3")
    (row,) = [it for it in results(out) if it["method"] == "flap"]
    (pruned,) = [it for it in results(finished[0]) if it["method"] == "flap"]
    assert row["parameters"] == pruned["parameters"] and row["kl"] != pruned["kl"]
    before, after = (load_file(Path(it["checkpoint"]) / "model.safetensors") for it in (pruned, row))
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


def test_other_ratios_take_up_the_first_pass_and_settings_the_students(config, finished, tmp_path):
    """Published settings differ at 30 %; given for both, the student is one."""

    def passes(*more):
        given = ["--config", config, "--out", finished[0], *arguments(1), "--dry-run"]
        code, shown, said = in_process(sweep_command.main, *given, *more)
        assert code == 0, said
        lines = [it.split() for it in shown.splitlines() if it.startswith("importance ")]
        return sorted("reuse" in it for it in lines)

    alone = ("--ratios", "0.2,0.3", "--methods", ",".join(["hfprune", *RIVALS]))
    assert passes(*alone) == [False, True, True]
    same = ("--set", "prune.teacher_share=0.4", "--set", "prune.teacher_temperature=0.2")
    assert passes(*alone, *same) == [True, True]
    assert passes("--ratios", "0.3", "--methods", "hfprune") == [True], "with scores for all methods"


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

"""A sweep over a mixture of experts with the default methods and the one for whole experts, from command to tables."""

import pytest
import torch
import yaml
from families import save_model
from sweeps import finish, make_inputs, results, sweep
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.token_costs import token_costs

pytestmark = pytest.mark.slow

METHODS = ("--methods", "hfprune,surgeon-plain,hfprune-experts")
ARGUMENTS = ("--models", "moe", "--ratios", "0.2", "--ranks", "1", *METHODS)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    file = make_inputs(folder)
    save_model(folder / "moe", "glm4_moe", vocab_size=264, max_position_embeddings=512, n_routed_experts=6)
    settings = yaml.safe_load(file.read_text())
    del settings["methods"]
    settings["recovery"] |= {"dtype": "bfloat16", "max_steps": 1}
    settings["evaluation"]["tasks"] = []
    file.write_text(yaml.safe_dump(settings | {"models": ["moe"], "aliases": {"moe": {"path": "moe"}}}))
    return file


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(config, out, *ARGUMENTS)
    return out


def test_the_default_methods_come_to_a_row_that_plain_transformers_loads(config, finished):
    dense, control, row, of_experts = results(finished)
    assert [each["method"] for each in (dense, control, row, of_experts)] == ["", "", "hfprune", "hfprune-experts"]
    checkpoint = open_checkpoint(finished / "checkpoints" / "moe-0.2-hfprune-lora")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert int(row["parameters"]) == checkpoint.parameters == sum(map(torch.numel, model.state_dict().values()))
    reached = 1 - checkpoint.parameters / int(dense["parameters"])
    assert 0.2 <= reached == pytest.approx(float(row["ratio_reached"]))
    assert int(row["moe_intermediate_size"]) == model.config.moe_intermediate_size == 8
    assert token_costs(checkpoint).active_parameters < checkpoint.parameters
    assert float(dense["kl"]) < 1e-6 < float(row["kl"])
    assert [int(each["n_routed_experts"]) for each in (dense, control, row, of_experts)] == [6, 6, 6, 3]


def test_a_second_run_starts_no_stage_and_a_dry_run_tells_what_is_left_out(config, finished):
    again = sweep(config, finished, *ARGUMENTS, "--dry-run")
    assert "11 reuse, 0 run" in again.stdout, again.stdout
    starts = "checkpoint of", "moe 0.2 hfprune"
    headers, *shown = [line.split() for line in again.stdout.splitlines() if line.startswith(starts)]
    assert headers[2] == "experts" and [line[line.index("lora") + 1] for line in shown] == ["6", "3"]
    assert "method 'surgeon-plain': left out, since the model is a mixture of experts" in again.stdout

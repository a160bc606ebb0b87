"""A sweep with a method whose shape is plain, next to the published one, from the command to the tables."""

import shutil

import pytest
import yaml
from shapes import silence
from sweeps import finish, make_inputs, results
from tiny import save_tiny
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

# The only number of groups that three devices can share: six query heads don't divide 32, as LlamaConfig requires.
LAYERS, GROUPS, SHARED = 4, 4, 3
PLAIN = {
    "criterion": "surgeon",
    "structures": ["neurons", "kv_groups", "layers"],
    "allocation": "plain",
    "tensor_parallel": SHARED,
    "refit": "layerwise",
    "distill": 1,
}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A configuration, and arguments that choose methods by name."""
    folder = tmp_path_factory.mktemp("inputs")
    config = make_inputs(folder)
    shutil.rmtree(folder / "alpha")
    save_tiny(folder / "alpha", num_hidden_layers=LAYERS, num_attention_heads=2 * GROUPS, num_key_value_heads=GROUPS)
    for block in ("self_attn.o_proj", "mlp.down_proj"):  # so that the layer isn't missed
        silence(folder / "alpha" / "model.safetensors", f"layers.2.{block}.weight", by=0.01)
    (folder / "plain.yaml").write_text(yaml.safe_dump(PLAIN))
    methods = f"hfprune,{folder / 'plain.yaml'}"
    return config, [
        "--models",
        "alpha",
        "--ratios",
        "0.25",
        "--methods",
        methods,
        "--set",
        "distillation.dtype=float32",
        "--set",
        "evaluation.tasks=[]",
    ]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    config, arguments = command
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(config, out, *arguments, "--ranks", "1")
    return out


def row_of(out, method):
    (row,) = [row for row in results(out) if row["method"] == method]
    return row


def test_both_methods_share_one_calibration_pass_and_have_their_rows(finished):
    assert len(list((finished / "store" / "importance").iterdir())) == 1
    plain, published = row_of(finished, "plain"), row_of(finished, "hfprune")
    assert plain["status"] == published["status"] == "done"
    assert plain["num_hidden_layers"] == "3" and plain["num_key_value_heads"] == str(SHARED)
    assert 0 < float(plain["kl"]) < float(published["kl"])
    assert float(published["ratio_reached"]) == pytest.approx(0.25, abs=0.005)
    one_step = SHARED * int(plain["num_hidden_layers"]) * 3 * 32 / int(results(finished)[0]["parameters"])
    assert int(plain["intermediate_size"]) % SHARED == 0
    assert 0.25 <= float(plain["ratio_reached"]) < 0.25 + one_step, "rounded down to what devices share"
    table = (finished / "results.md").read_text()
    assert "plain" in table and "layers" in table and "KV heads" in table


def test_what_was_recovered_is_a_mistral_that_plain_transformers_loads(finished):
    row = row_of(finished, "plain")
    model = AutoModelForCausalLM.from_pretrained(finished / row["checkpoint"])
    assert model.config.model_type == "mistral"
    assert sum(weight.numel() for weight in model.parameters()) == int(row["parameters"])
    heads = model.config.num_hidden_layers, model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads == (3, 2 * SHARED, SHARED)

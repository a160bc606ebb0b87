"""KV groups scored together with neurons, from the stage's first window to its last file."""

from typing import NamedTuple

import pytest
import torch
from core_definition import (
    GRADIENT_CRITERIA,
    NEURONS,
    OF_ONE_PASS,
    assert_scores_of_weights,
    definition,
    moments,
)
from damage import nothing_reaches_the_disk
from safetensors.torch import load_file
from tiny import importance_stage, save_tiny, tiny_model, write_documents
from worlds import Ranks, run_in_threads, without_deepspeed

from hfprune_dist.core.elimination import elimination_scores
from hfprune_dist.methods import CRITERIA
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.score_names import SCORES, score_name, scores_of_layers

SEED = 3
BOTH = ["neurons", "kv_groups"]
OUTPUT = "self_attn.o_proj"


@pytest.fixture(scope="module", autouse=True)
def patch():
    with pytest.MonkeyPatch.context() as patch, nothing_reaches_the_disk():
        without_deepspeed(patch)
        yield patch


class Model(NamedTuple):
    variant: str
    layers: int
    groups: int
    queries: int
    head_dim: int

    def shape(self):
        heads = self.groups * self.queries
        size = {"num_attention_heads": heads, "num_key_value_heads": self.groups, "hidden_size": heads * self.head_dim}
        if self.variant != "qwen2":  # which supports no other head size
            size |= {"hidden_size": 4 * heads, "head_dim": self.head_dim}
        return {"num_hidden_layers": self.layers, "intermediate_size": 20, **size}

    def tiny(self):
        return tiny_model(self.variant, **self.shape())


def run(folder, name, ranks, structures=BOTH):
    """Run the stage in the store of this name, and return the tensors and the bytes of the files that it leaves."""
    calibration = {"sequence_length": 16, "text_field": "text", "samples": 5, "micro_batch_size": 1, "shard_size": 2}
    params = {"calibration": calibration, "criteria": OF_ONE_PASS, "dtype": "float32"}
    params |= {"add_bos_token": True, "seed": SEED, **({} if structures == ["neurons"] else {"structures": structures})}
    store, stage = Store(folder / name), importance_stage(folder, "groups", params)
    run_in_threads(store, stage, ranks)
    files = list(store.path(stage.id).glob("*.safetensors"))
    return {it.name: load_file(it) for it in files}, {it.name: it.read_bytes() for it in files}


def assert_as_defined(scores, model, windows):
    dense, channels = model.tiny(), model.queries * model.head_dim
    for name in (*GRADIENT_CRITERIA, "activation_l1", "fluctuation"):
        expected = definition(dense, windows, name, SEED, channels, OUTPUT)
        ours = torch.stack(scores_of_layers(scores, name, "kv_groups"))
        assert ours.shape == (model.layers, model.groups)
        assert (ours - expected).norm() < 1e-3 * expected.norm() + 1e-9, name
    for kind, units, output in (("neurons", 20, NEURONS), ("kv_groups", model.groups, OUTPUT)):

        def ours(name, kind=kind):
            return torch.stack(scores_of_layers(scores, name, kind))

        assert_scores_of_weights(ours, dense, windows, units, output)
    for layer, (gram, curvature, fisher) in enumerate(moments(dense, windows, SEED, channels, OUTPUT)):
        attention = dense.model.layers[layer].self_attn
        expected = elimination_scores(gram, curvature, attention.o_proj.weight.detach(), fisher)
        found = scores[score_name(layer, "surgeon", "kv_groups")]
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-12)
        for group, norm in enumerate(norms(attention, model.groups)):
            assert scores[score_name(layer, "magnitude", "kv_groups")][group].item() == pytest.approx(norm)


def norms(attention, groups):
    for group in range(groups):
        rows = [it.weight.chunk(groups)[group] for it in (attention.q_proj, attention.k_proj, attention.v_proj)]
        owned = [*rows, attention.o_proj.weight.chunk(groups, dim=1)[group]]
        yield sum(it.double().square().sum() for it in owned).sqrt().item()


@pytest.mark.parametrize(
    "model",
    [
        Model("qwen3", 2, 3, 2, 4),
        Model("qwen2", 1, 4, 1, 4),
        Model("llama-tied-biases", 3, 1, 3, 2),
    ],
    ids=str,
)
def test_groups_are_as_defined_and_neurons_as_without_them_on_any_ranks(tmp_path, model):
    save_tiny(tmp_path / "model", model.variant, **model.shape())
    write_documents(tmp_path / "text.jsonl")
    one, files = run(tmp_path, "one", Ranks(1))
    scores, windows = one[SCORES], one["windows.safetensors"]["input_ids"]
    assert_as_defined(scores, model, windows)
    alone = run(tmp_path, "without", Ranks(1), ["neurons"])[0][SCORES]
    assert len(alone) == model.layers * len(OF_ONE_PASS)
    of_neurons = [name for name in OF_ONE_PASS if CRITERIA[name].units == {"neurons"}]
    assert len(scores) == 2 * len(alone) - model.layers * len(of_neurons)
    assert all(torch.equal(scores[name], expected) for name, expected in alone.items())
    assert run(tmp_path, "many", Ranks(3))[1] == files

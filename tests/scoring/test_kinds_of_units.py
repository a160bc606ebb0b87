"""KV groups scored together with neurons, from the stage's first window to its last file."""

from dataclasses import dataclass

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
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import VARIANTS, importance_stage, save_tiny, tiny_model, write_documents
from worlds import Death, Ranks, run_in_threads, without_deepspeed

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


@dataclass(frozen=True)
class Model:
    variant: str
    layers: int
    groups: int
    queries: int
    head_dim: int

    @property
    def shape(self):
        heads = self.groups * self.queries
        size = {"num_attention_heads": heads, "num_key_value_heads": self.groups, "hidden_size": heads * self.head_dim}
        if self.variant != "qwen2":  # which supports no other head size
            size |= {"hidden_size": 4 * heads, "head_dim": self.head_dim}
        return {"num_hidden_layers": self.layers, "intermediate_size": 20, **size}

    def tiny(self):
        return tiny_model(self.variant, **self.shape)


MODELS = st.builds(
    Model,
    variant=st.sampled_from(sorted(VARIANTS)),
    layers=st.integers(1, 3),
    groups=st.integers(1, 4),
    queries=st.integers(1, 3),
    head_dim=st.sampled_from((2, 4, 8)),
)
CALIBRATIONS = st.fixed_dictionaries(
    {"samples": st.integers(1, 5), "micro_batch_size": st.integers(1, 2), "shard_size": st.integers(1, 2)}
)
SIZES = st.integers(1, 4)


class Scored:
    """A model and its text, to be scored in stores of their own."""

    def __init__(self, folder, model, calibration):
        self.folder = folder
        save_tiny(folder / "model", model.variant, **model.shape)
        write_documents(folder / "text.jsonl")
        self._settings = {"sequence_length": 16, "text_field": "text", **calibration}

    def stage(self, structures):
        params = {"calibration": self._settings, "criteria": OF_ONE_PASS, "dtype": "float32"}
        params |= {"add_bos_token": True, "seed": SEED}
        if structures != ["neurons"]:
            params["structures"] = structures
        return importance_stage(self.folder, "groups", params)

    def files(self, name, ranks, structures=BOTH):
        """Run the stage in the store of this name, and return the files that it leaves."""
        store, stage = Store(self.folder / name), self.stage(structures)
        run_in_threads(store, stage, ranks)
        return {file.name: file.read_bytes() for file in store.path(stage.id).glob("*.safetensors")}

    def load(self, name, file, structures=BOTH):
        return load_file(Store(self.folder / name).path(self.stage(structures).id) / file)


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


# The victim is numbered among the ranks, and the collective before which it dies among the victim's own.
@settings(derandomize=True, deadline=None, max_examples=10)
@example(
    model=Model("qwen3", 2, 2, 2, 8),
    calibration={"samples": 2, "micro_batch_size": 1, "shard_size": 1},
    size=4,
    later=3,
    dies_at=0.95,
    victim=0,
)
@given(
    model=MODELS,
    calibration=CALIBRATIONS,
    size=SIZES,
    later=SIZES,
    dies_at=st.floats(0, 0.999),
    victim=st.integers(0, 3),
)
def test_groups_are_as_defined_and_neurons_as_without_them_on_any_ranks_after_any_death(
    tmp_path_factory, model, calibration, size, later, dies_at, victim
):
    scored = Scored(tmp_path_factory.mktemp("groups"), model, calibration)
    files = scored.files("one", Ranks(1))
    scores, windows = scored.load("one", SCORES), scored.load("one", "windows.safetensors")["input_ids"]
    assert_as_defined(scores, model, windows)

    without = scored.files("without", Ranks(1), ["neurons"])
    assert {name: it for name, it in files.items() if name != SCORES} == {
        name: it for name, it in without.items() if name != SCORES
    }
    alone = scored.load("without", SCORES, ["neurons"])
    assert len(alone) == model.layers * len(OF_ONE_PASS)
    of_neurons = [name for name in OF_ONE_PASS if CRITERIA[name].units == {"neurons"}]
    assert len(scores) == 2 * len(alone) - model.layers * len(of_neurons)
    for name, expected in alone.items():
        assert torch.equal(scores[name], expected), name

    ranks = Ranks(size)
    assert scored.files("many", ranks) == files
    victim %= size
    mortal = Ranks(size, deaths={victim: int(dies_at * len(ranks.logs[victim]))})
    with pytest.raises(Death):
        scored.files("killed", mortal)
    assert scored.files("killed", Ranks(later)) == files

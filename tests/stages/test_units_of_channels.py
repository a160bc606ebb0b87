"""A channel times s and its column over s are the same model: so are its scores, what stays, and what refits make."""

import pytest
import torch
from core_definition import OF_ONE_PASS
from made_stages import stage_of
from ranks import metrics_of, run_here
from safetensors.torch import load_file, save_file
from scoring import make_stage
from shapes import kept_of
from tiny import save_tiny, write_documents

from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import Input

BOTH = ["neurons", "kv_groups"]
# What its paper defines by the size of weights alone.
OF_SIZES = "magnitude"
CRITERIA = [name for name in OF_ONE_PASS if name != OF_SIZES]


def write_in_other_units(folder, model):
    """Multiply every channel of MLPs and values by up to 1000, or divide it, and give its columns the reciprocal."""
    tensors, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(5)

    def factors(count):
        return 10 ** (6 * torch.rand(count, generator=generator) - 3)

    for number in range(2):
        up, down, value, output = (
            f"model.layers.{number}.{name}_proj.weight" for name in ("mlp.up", "mlp.down", "self_attn.v", "self_attn.o")
        )
        of_neurons, of_values = factors(len(tensors[up])), factors(len(tensors[value]))
        of_heads = of_values.view(2, 1, -1).expand(2, 2, -1).flatten()  # two query heads read the values of a group
        tensors |= {up: tensors[up] * of_neurons[:, None], down: tensors[down] / of_neurons}
        tensors |= {value: tensors[value] * of_values[:, None], output: tensors[output] / of_heads}
    save_tiny(folder / "model")
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    write_documents(folder / "text.jsonl", count=40)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The same model in two folders, in different units, with its scores."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    save_tiny(one / "model")
    write_documents(one / "text.jsonl", count=40)
    write_in_other_units(two, one / "model")
    stages = [make_stage(folder, criteria=OF_ONE_PASS, structures=BOTH, samples=40) for folder in (one, two)]
    for folder, stage in zip((one, two), stages, strict=True):
        run_here(Store(folder / "store"), stage)
    return list(zip((one, two), stages, strict=True))


def test_scores_are_the_same_but_for_those_of_sizes(scored):
    scores, others = (
        load_file(Store(folder / "store").handle(stage.id).artifact / "importance.safetensors")
        for folder, stage in scored
    )
    for name, expected in scores.items():
        error = (others[name] - expected).norm() / expected.norm()
        assert error > 1e-3 if name.endswith(OF_SIZES) else error < 1e-3, name


@pytest.mark.parametrize("refit", ["none", "bias", "dense", "layerwise", "block"])
@pytest.mark.parametrize("allocation", ["plain", "searched"])
def test_what_stays_and_what_refits_make_of_it_is_the_same(scored, refit, allocation):
    params = {"ratio": 0.2, "criterion": "surgeon", "allocation": allocation, "refit": refit, "multiple_of": 1}
    params |= {"structures": [*BOTH, "layers"], "dtype": "float32", "micro_batch_size": 2, "effort": "quick"}
    results = []
    for folder, importance in scored:
        model, store = folder / "model", Store(folder / "store")
        inputs = {"model": Input(FileHashes(None).of_folder(model), str(model)), "importance": importance.as_input()}
        stage = stage_of("prune", "tiny", params, inputs)
        run_here(store, stage)
        pruned = load_causal_lm(store.handle(stage.id).artifact, torch.float32)
        ids = torch.randint(3, 250, (4, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            results.append((kept_of(store, stage), metrics_of(store, stage), pruned(ids).logits))
    (kept, metrics, logits), (others, measured, changed) = results
    assert kept == others
    assert min(metrics["search_kl"].values()) == pytest.approx(min(measured["search_kl"].values()), rel=1e-3)
    assert (logits - changed).norm() < 1e-3 * logits.norm()

"""Experts, their neurons, and those of shared experts and dense layers, from the stage's first window to its
file.
"""

import pytest
import torch
from core_definition import definition as of_channels
from damage import nothing_reaches_the_disk
from families import make_model, save_model
from mixtures import COUNT, KIND, WHOLE, definition, experts_of, routed_outputs
from ranks import files_of, finish
from safetensors.torch import load_file
from tiny import importance_stage, write_documents
from worlds import Ranks, run_in_threads, without_deepspeed

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.methods import CRITERIA
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.score_names import SCORES, score_name

SEED, VOCABULARY = 3, 264
BOTH = [NEURONS, WHOLE]
NAMES = sorted(name for name, it in CRITERIA.items() if "expert_neurons" in it.units)
NAMES_OF_WHOLE = sorted(name for name, it in CRITERIA.items() if "experts" in it.units)
EVERY = sorted({*NAMES, *NAMES_OF_WHOLE})
DEFINED = ("cross_entropy", "entropy", "fisher_signs")


@pytest.fixture(scope="module")
def threads():
    with pytest.MonkeyPatch.context() as patch, nothing_reaches_the_disk():
        without_deepspeed(patch)
        yield


def stage_of(folder, model_type, criteria=EVERY, dtype="float32", calibration=None, structures=BOTH, **changes):
    save_model(folder / "model", model_type, vocab_size=VOCABULARY, **changes)
    write_documents(folder / "text.jsonl")
    settings = {"samples": 4, "sequence_length": 12, "micro_batch_size": 1, "shard_size": 1, **(calibration or {})}
    params = {"calibration": {**settings, "text_field": "text"}, "criteria": list(criteria)}
    params |= {"dtype": dtype, "add_bos_token": True, "seed": SEED}
    params |= {} if structures == [NEURONS] else {"structures": structures}
    return importance_stage(folder, model_type, params)


def weights_of(model, layer, output):
    """Return the rows [matrices, units, hidden_size] that make an output projection's neurons, and their columns."""
    if output.endswith(".experts"):
        experts = experts_of(model)[layer]
        rows, columns = experts.gate_up_proj.data, experts.down_proj.data
        if experts.is_transposed:
            rows, columns = rows.mT, columns.mT
            pair = [rows[:, 0::2], rows[:, 1::2]]
        else:
            pair = rows.chunk(2, dim=1)
        return torch.stack([it.flatten(0, 1) for it in pair]), columns.mT.flatten(0, 1)
    block = model.get_submodule(output.removesuffix(".down_proj"))
    return torch.stack([block.gate_proj.weight.data, block.up_proj.weight.data]), block.down_proj.weight.data.T


# With a tensor for each expert; with shared experts and dense layers; with one tensor for all, transposed.
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_scores_of_all_units_are_as_defined(tmp_path, model_type, threads):
    store, stage = Store(tmp_path / "store"), stage_of(tmp_path, model_type)
    run_in_threads(store, stage, Ranks(1))
    scores = load_file(store.handle(stage.id).artifact / SCORES)
    windows = load_file(store.handle(stage.id).artifact / "windows.safetensors")["input_ids"]
    checkpoint, model = open_checkpoint(tmp_path / "model"), make_model(model_type, vocab_size=VOCABULARY)
    places = {
        (units.kind, layer): units.tensor(layer, units.output)
        for units in checkpoint.pruned_kinds([NEURONS])
        for layer, count in enumerate(units.counts)
        if count
    }
    others = {place: name for place, name in places.items() if place[0] != KIND}
    assert {layer for kind, layer in places if kind == KIND} == {*experts_of(model)}

    def assert_scored(name, expected, tolerance=1e-4):
        for (kind, layer), expected_U in expected.items():
            ours_U = scores[score_name(layer, name, kind)]
            assert (ours_U - expected_U).norm() <= tolerance * expected_U.norm(), (name, kind, layer)

    weights = {place: weights_of(model, place[1], name) for place, name in places.items()}
    norms = {place: columns.double().norm(dim=1) for place, (_, columns) in weights.items()}

    for name in DEFINED:
        assert_scored(name, definition(model, windows, name, SEED, others=others))

    def with_experts(of_neurons, of_expert):
        wholes = {(WHOLE, at[1]): of_expert(it.view(COUNT, -1)) for at, it in of_neurons.items() if at[0] == KIND}
        return of_neurons | wholes

    assert_scored("reap", routed_outputs(model, windows))
    sums = definition(model, windows, "activations", others=others)
    absolute = {place: columns.double().abs().sum(1) for place, (_, columns) in weights.items()}
    products = {place: it.sqrt() * absolute[place] for place, it in sums.items()}
    assert_scored("activation_l1", with_experts(products, lambda it_EN: it_EN.sum(1)))
    squares = {place: rows.double().square().sum((0, 2)) + norms[place] ** 2 for place, (rows, _) in weights.items()}
    norms_of_units = {place: it.sqrt() for place, it in squares.items()}
    assert_scored("magnitude", with_experts(norms_of_units, lambda it_EN: it_EN.norm(dim=1)), 1e-6)
    without = {name for name, it in scores.items() if not len(it)}
    of_whole = len(experts_of(model)) * len(NAMES_OF_WHOLE)
    assert len(scores) - len(without) == len(places) * len(NAMES) + of_whole


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe"])
def test_kv_groups_are_scored_beside_experts(tmp_path, model_type, threads):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    names, scores = ["activation_l1", "entropy", "fisher_signs"], {}
    for beside, structures in ((False, [NEURONS]), (True, [NEURONS, "kv_groups"])):
        folder = tmp_path / str(beside)
        folder.mkdir()
        stage, store = stage_of(folder, model_type, names, structures=structures, **heads), Store(folder / "store")
        run_in_threads(store, stage, Ranks(1))
        scores[beside] = load_file(store.handle(stage.id).artifact / SCORES)
        windows = load_file(store.handle(stage.id).artifact / "windows.safetensors")["input_ids"]
    assert all(torch.equal(scores[True][name], it) for name, it in scores[False].items()), "the same bits"
    model = make_model(model_type, vocab_size=VOCABULARY, **heads)
    for module in model.modules():  # whose own kernels know no float64
        getattr(module, "config", model.config)._experts_implementation = "eager"
    for name in names:
        expected = of_channels(model, windows, name, SEED, channels=2 * 8, output="self_attn.o_proj")
        for layer, expected_U in enumerate(expected):
            ours_U = scores[True][score_name(layer, name, "kv_groups")]
            assert (ours_U - expected_U).norm() <= 1e-4 * expected_U.norm(), (name, layer)


@pytest.mark.parametrize(
    ("model_type", "dtype", "checkpointing"),
    [("qwen2_moe", "float32", False), ("deepseek_v3", "bfloat16", True)],
)
def test_two_sharded_ranks_have_the_bits_of_one(tmp_path, model_type, dtype, checkpointing):
    """The experts are large enough for DeepSpeed to shard them, and windows enough for it to learn their order."""
    criteria, sizes = ["activation_l1", "entropy", "fisher_signs", "reap"], {"moe_intermediate_size": 256}
    stage = stage_of(tmp_path, model_type, criteria, dtype, {"samples": 8}, hidden_size=128, **sizes)
    stores = {ranks: Store(tmp_path / f"on {ranks}") for ranks in (1, 2)}
    for ranks, store in stores.items():
        sharded = {"sharding": "zero3", "activation_checkpointing": checkpointing} if ranks == 2 else {}
        finish(store, stage, ranks, **sharded)
    assert files_of(stores[1], stage) == files_of(stores[2], stage)

"""The estimates of memory and work against what small models really keep and do."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from families import EXPERTS, save_model
from families import FAMILIES as FEATURES
from lanes import TO_DEVICE, TO_HOST, WEIGHTS, lanes
from mixtures import some_kept
from more_families import MORE_EXPERTS
from peak_bytes import PeakBytes
from peft import LoraConfig, get_peft_model
from ranks import SoloWorld
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from unit_outputs import unit_outputs
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.families import FAMILIES
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.config.parameters import EfficiencyParameters
from hfprune_dist.core import blocks, elimination, gram, head
from hfprune_dist.core.bound_losses import Batch, TeacherSettings
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.core.linear_observer import SeenLinear
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
from hfprune_dist.core.unit_outputs import InputProjection, UnitOutputs
from hfprune_dist.core.weight_products import CoupledProducts
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.models.experts import see_experts
from hfprune_dist.models.memory_efficient_backward import checkpoint_activations, use_memory_efficient_backward
from hfprune_dist.planning import importance_footprint, layer_pass_footprint, product_footprint
from hfprune_dist.planning.dimensions import checkpoint_dimensions, dimensions_of
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.footprint import fits
from hfprune_dist.planning.generation_footprint import Generate
from hfprune_dist.planning.gpu_needs import Gpus
from hfprune_dist.planning.importance_footprint import Importance
from hfprune_dist.planning.layer_pass_footprint import (
    LowRank,
    Reference,
    Refit,
    memory_of_layer_pass,
    pinned_bytes,
    widest,
)
from hfprune_dist.planning.product_footprint import coupled_bytes
from hfprune_dist.planning.training_footprint import Train
from hfprune_dist.refit.cheap_fits import CheapFits, Scored
from hfprune_dist.refit.dense_refit import DenseRefit
from hfprune_dist.refit.low_rank_layers import LowRankLayers
from hfprune_dist.refit.low_rank_pass import LowRankPass, Sizes
from hfprune_dist.refit.measurement import dense_outputs
from hfprune_dist.refit.norm_gradients import NormGradients
from hfprune_dist.refit.pruned_layers import PrunedLayers
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.scoring.curvature import Curvature
from hfprune_dist.scoring.weight_gradients import WeightGradients
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.training.loraprune import UnitMasks

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 264}
PUBLISHED = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
GIB = 2**30


def published(size):
    return dimensions_of(PUBLISHED[size] | {"vocab_size": 32000})


@contextlib.contextmanager
def kept_for_backward(model):
    """Count the bytes of distinct tensors, other than weights, that autograd keeps."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for size, _ in kept.values())


def scored(model, kinds=("neurons",)):
    family = FAMILIES[model.config.model_type]
    head, structures = family.head_of(model), family.structures(model.config.to_dict())
    return ScoredModel(
        body=lambda input_ids: family.body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((head.weight, head.bias)),
        outputs={kind: unit_outputs(structures[kind], model) for kind in kinds},
        student={"neurons": torch.rand(model.config.num_hidden_layers, model.config.intermediate_size) > 0.1},
    )


def score(model, criteria, groups=False, tokens=128, micro_batches=1):
    """Score micro-batches of two windows; the only rank adds up gradients of weights."""
    kinds = ("neurons", "kv_groups") if groups else ("neurons",)
    model_scored = scored(model, kinds)
    sums = UnitSums(model_scored.outputs, [CRITERIA[name] for name in criteria], None, seen_linears(model, kinds))
    for _ in range(micro_batches):
        input_ids_BT = torch.ones(2, tokens, dtype=torch.int64)
        score_batch(model_scored, Batch(input_ids_BT, range(2), 264, 0, TeacherSettings(0.4, 0.2)), sums)


def observing(criteria):
    """Return the fields of an ``Importance`` that follow from such criteria."""
    summed = {CRITERIA[name].summed for name in criteria}
    forms = {"weight_gradients": "weight_gradient", "coupled_products": "coupled_product"}
    return {name: it in summed for name, it in forms.items()}


def is_of_a_student(losses):
    return any(CRITERIA[name].loss.of == "student" for name in losses)


def seen_linears(model, kinds):
    structures = FAMILIES[model.config.model_type].structures(model.config.to_dict())
    layers = model.model.layers
    modules = {
        name: [layer.get_submodule(name.removesuffix(".weight")) for layer in layers]
        for kind in kinds
        for name in structures[kind].weights
    }
    sizes = {name: [tuple(module.weight.shape) for module in of_layers] for name, of_layers in modules.items()}
    gradients = WeightGradients(sizes, Path("none"), SoloWorld())
    return [
        SeenLinear(module, see)
        for name, of_layers in gradients.seeing(counts=True).items()
        for module, see in zip(modules[name], of_layers, strict=True)
    ]


@pytest.mark.parametrize("size", [("7B", 6.74), ("13B", 13.0), ("70B", 69.0)])
def test_the_parameters_of_published_models(size):
    name, billions = size
    assert published(name).parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_kept_activations_of_a_student():
    """It also checks that the teacher's forward keeps nothing where no loss is the dense model's."""
    model = tiny_model("llama", **SHAPE).bfloat16().requires_grad_(False)
    use_memory_efficient_backward(model, FAMILIES["llama"])
    job = Importance(windows=2, tokens=128, losses=0, student=True, **observing(["coupled_taylor_distilled"]))
    with kept_for_backward(model) as counted:
        score(model, ["coupled_taylor_distilled"])
        estimate = 2 * 128 * job.activation_bytes(dimensions_of(model.config.to_dict()))
        assert estimate == pytest.approx(counted(), rel=0.05)


@pytest.mark.parametrize("criterion", ["entropy", "weight_taylor", "coupled_taylor"])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2"])
def test_kept_activations_of_the_calibration_pass(variant, groups, criterion):
    model = tiny_model(variant, **SHAPE).bfloat16().requires_grad_(False)
    use_memory_efficient_backward(model, FAMILIES[model.config.model_type])
    job = Importance(windows=2, tokens=128, kv_groups=groups, **observing([criterion]))
    with kept_for_backward(model) as counted:
        score(model, [criterion], groups)
        estimate = 2 * 128 * job.activation_bytes(dimensions_of(model.config.to_dict()))
        assert estimate == pytest.approx(counted(), rel=0.05)


@pytest.mark.parametrize("criterion", ["entropy", "weight_taylor", "coupled_taylor"])
def test_kept_activations_of_mlps_without_a_gate(tmp_path, monkeypatch, criterion):
    checkpoint = open_checkpoint(save_model(tmp_path, "arcee", **SHAPE))
    monkeypatch.setitem(FAMILIES, "arcee", checkpoint.family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    use_memory_efficient_backward(model, checkpoint.family)
    job = Importance(windows=2, tokens=128, **observing([criterion]))
    with kept_for_backward(model) as counted:
        score(model, [criterion])
        estimate = 2 * 128 * job.activation_bytes(checkpoint_dimensions(checkpoint))
        assert estimate == pytest.approx(counted(), rel=0.05)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=lora_targets(checkpoint.family))
    trained = sum(it.numel() for it in get_peft_model(model, lora).parameters() if it.requires_grad)
    job = Train(rows=2, tokens=128, rank=4, dropout=False)
    assert job.lora_parameters(checkpoint_dimensions(checkpoint)) == trained


def test_checkpointing_keeps_the_inputs_of_layers():
    dims = published("7B")
    plain, checkpointed = (Importance(1, 1024, checkpointing=on).activation_bytes(dims) for on in (False, True))
    assert checkpointed < plain / 4
    model = tiny_model("llama", **SHAPE).bfloat16().requires_grad_(False)
    use_memory_efficient_backward(model, FAMILIES["llama"])
    checkpoint_activations(model, FAMILIES["llama"])
    inputs = 3 * 2 * 128 * 64 * 2
    seen = []
    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].nbytes))
    scored(model).body(torch.ones(2, 128, dtype=torch.int64))
    assert sum(seen) == inputs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("losses", "groups"),
    [
        (["entropy"], False),
        (["entropy"], True),
        (["entropy", "fisher"], False),
        (["weight_taylor"], False),
        (["weight_taylor"], True),
        (["coupled_taylor"], False),
        (["coupled_taylor"], True),
        (["coupled_taylor_distilled"], False),
    ],
)
def test_memory_of_the_calibration_pass(losses, checkpointing, groups, monkeypatch):
    model = tiny_model("llama", **{**SHAPE, "num_hidden_layers": 6}).bfloat16().requires_grad_(False)
    use_memory_efficient_backward(model, FAMILIES["llama"])
    if checkpointing:
        checkpoint_activations(model, FAMILIES["llama"])
    # Memory that is the same for every model would hide everything else of one this small.
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**12 // torch.get_num_threads())
    monkeypatch.setattr(product_footprint, "ACCELERATOR_BYTES", 0)
    for name in ("HEAD_CHUNK_BYTES", "ACCELERATOR_BYTES"):
        monkeypatch.setattr(importance_footprint, name, 0)
    student, seen = is_of_a_student(losses), observing(losses)
    job = Importance(2, 48, len(losses) - student, checkpointing=checkpointing, student=student, kv_groups=groups)
    job = replace(job, **seen)
    with PeakBytes() as counted:
        score(model, losses, groups, tokens=48, micro_batches=1 + seen["weight_gradients"])  # so that there are sums
    # Weights count as well: their transposes are views made meanwhile.
    assert 0.9 < counted.peak / job.memory(dimensions_of(model.config.to_dict()), 1).total < 1.05


def test_no_host_holds_more_of_the_curvature_than_a_layer():
    dims = published("7B")
    assert Importance(1, 1024, samples=64).host_bytes(dims, 8) == 0
    few, many = (Importance(1, 1024, curvature=True, samples=samples) for samples in (8, 10_000))
    assert few.host_bytes(dims, 8) == 16 * 4096**2, "while it is saved"
    pinned = 4 * 1024 * 4096 * 2 + 2 * 2**25
    assert many.host_bytes(dims, 8) == 1250 * 1024 * 4096 * 2 + pinned, "hidden states of the pass layer by layer"
    assert replace(few, kv_groups=True).host_bytes(dims, 8) == 16 * 4096**2


@pytest.mark.parametrize(("ranks", "layers"), [(1, 32), (2, 16), (4, 8), (5, 7), (32, 1), (100, 1)])
@pytest.mark.parametrize("kinds", [1, 2])
def test_ranks_share_the_curvature_of_layers(kinds, ranks, layers):
    job = Importance(1, 1024, curvature=True, samples=64, kv_groups=kinds == 2)
    own_terms = 8 * kinds * 32 if ranks > 1 else 0
    assert job.curvature_bytes(published("7B"), ranks) == (8 * kinds * layers + own_terms + 4) * 4096**2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_memory_of_the_curvature_of_layers(ranks, monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**40)  # as on a GPU: in one go
    layers, hidden_size = 5, 600
    with PeakBytes() as counted:
        curvature = Curvature({"neurons": (layers, hidden_size)}, tmp_path, SoloWorld(0, ranks))
        see = curvature.seeing(counts=True)
        for layer in 2 * list(reversed(range(layers))):
            see["neurons"](layer, torch.randn(4, hidden_size))
        curvature.end_shard()
    dims = replace(published("7B"), num_layers=layers, hidden_size=hidden_size)
    expected = Importance(1, 4, curvature=True, samples=1).curvature_bytes(dims, ranks)
    assert 0.9 < counted.peak / expected < 1.05


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_of_the_gradients_of_weights(ranks, groups, monkeypatch, tmp_path):
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**40)  # as on a GPU: in one go
    layers, hidden, inner = 5, 96, 224
    dims = dimensions_of(
        {**SHAPE, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner}
        | {"num_attention_heads": 4, "num_key_value_heads": 2}
    )
    channels = [(inner, hidden)] * 2 + [(hidden, inner)]
    channels += [(hidden, hidden)] * 2 + [(hidden // 2, hidden)] * 2 if groups else []
    sizes = {str(number): [size] * layers for number, size in enumerate(channels)}
    with PeakBytes() as counted:
        gradients = WeightGradients(sizes, tmp_path, SoloWorld(0, ranks))
        seeing = gradients.seeing(counts=True)
        for layer in 2 * list(reversed(range(layers))):
            for name, see in seeing.items():
                rows, columns = sizes[name][layer]
                see[layer](torch.randn(1, columns), torch.randn(1, rows))
        gradients.end_shard()
    expected = Importance(1, 4, weight_gradients=True, kv_groups=groups).gradient_bytes(dims, ranks)
    assert 0.9 < counted.peak / expected < 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_a_layers_products(dtype, monkeypatch):
    """Gradients' ingredients are alive, one window in float32, of all three weights of a neuron at once."""
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**40)  # as on a GPU whose portions hold a layer
    inner, hidden, tokens, windows = 224, 96, 64, 3
    dims = replace(published("7B"), hidden_size=hidden, intermediate_size=inner)
    linears = [torch.nn.Linear(*sides, dtype=dtype) for sides in ((hidden, inner), (hidden, inner), (inner, hidden))]
    products = CoupledProducts([InputProjection(it) for it in linears[:2]], linears[2], inner, lambda _: None)
    with PeakBytes() as counted:
        inputs = [torch.randn(windows, tokens, it.in_features, dtype=dtype) for it in linears]
        gradients = [torch.randn(windows, tokens, it.out_features, dtype=dtype) for it in linears]
        weights = [it.weight.detach() for it in linears]
        for seen, weight, *shown in zip(products.seen_linears(), weights, inputs, gradients, strict=True):
            seen.see(*shown)
            seen.see_weight(weight)
    given = sum(it.nbytes for it in (*inputs, *gradients, *weights))
    # It counts gradients, which wait for one another.
    expected = coupled_bytes(dims, windows, tokens, dtype.itemsize) - sum(it.nbytes for it in gradients)
    assert 0.9 < (counted.peak - given) / expected < 1.05


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_products_take_as_much_on_any_number_of_ranks(ranks):
    with_products, without = (
        Importance(1, 4096, coupled_products=on).memory(published("7B"), ranks) for on in (True, False)
    )
    assert with_products.sums == without.sums == 0, "only scores travel"
    more = with_products.scratch - without.scratch
    assert more == Importance(1, 4096, coupled_products=True).memory(published("7B"), 1).scratch - without.scratch


@pytest.mark.parametrize(("ranks", "layers"), [(1, 32), (2, 16), (4, 8), (5, 7)])
def test_ranks_share_the_gradients_of_weights(ranks, layers):
    job, largest = Importance(1, 1024, weight_gradients=True, kv_groups=True), 4096 * 11008
    owned = 8 * layers * (3 * largest + 4 * 4096**2)
    assert job.gradient_bytes(published("7B"), ranks) == owned + 4 * largest, "too large for each rank to hold"
    assert job.host_bytes(published("7B"), ranks) == 16 * largest, "while it is saved"
    assert Importance(1, 1024).gradient_bytes(published("7B"), ranks) == 0


def test_curvature_of_a_large_model_with_its_attention_heads_fits_gpus():
    job = Importance(1, 1024, curvature=True, samples=1024, kv_groups=True)
    gpus = Gpus(nodes=2, per_node=8, memory=80 * 2**30)
    assert fits(job, published("70B"), gpus)
    assert job.curvature_bytes(published("70B"), 16) < 6 * 2**30


def of_one_layer(folder, hidden_size, intermediate_size):
    """Return a model of one layer, and the stream of 16 windows of 16 tokens through it."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(save_tiny(folder, **sizes, vocab_size=264))
    return checkpoint, LayerStream(checkpoint, torch.randint(264, (16, 16)), torch.float32, 2, SoloWorld())


@pytest.mark.parametrize("kinds", [["neurons"], ["neurons", "kv_groups"]])
@pytest.mark.parametrize("dims", [(32, 1024), (512, 512)], ids=["wide", "square"])
def test_memory_of_the_gram_matrices_of_a_layer(dims, kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**40)  # as on a GPU: in one go
    checkpoint, stream = of_one_layer(tmp_path / "model", *dims)
    with PeakBytes() as counted:
        stream.grams(0, next(stream.layers([0]))[1], [checkpoint.structures[kind] for kind in kinds])
    channels = [dims[1], dims[0]][: len(kinds)]
    assert 0.9 < counted.peak / at_once(memory_of_layer_pass(dimensions_of(checkpoint.config), 32, 4, channels)) < 1.05


def test_matrices_of_both_kinds_wait_while_one_is_eliminated():
    dims = replace(published("7B"), num_layers=1)  # so that the whole model needs less
    few = Importance(1, 1024, curvature=True, samples=64)
    both = replace(few, kv_groups=True)
    assert few.memory(dims, 1).sums == 32 * 11008**2
    assert both.memory(dims, 1).sums == 32 * 11008**2 + 8 * 4096**2
    assert both.memory(dims, 8).sums == 32 * (11008**2 + 4096**2), "a layer waits; means of another, and their mean"


@pytest.mark.parametrize(
    ("dims", "dtype"), [((64, 1024), torch.float32), ((256, 512), torch.bfloat16)], ids=["wide", "square"]
)
@pytest.mark.parametrize(
    ("kind", "rank", "ranks", "groups"),
    [
        ("dense", 0, 1, False),
        ("dense", 1, 3, False),
        ("layerwise", 0, 1, False),
        ("block", 0, 1, False),
        ("block", 0, 3, False),
        ("dense", 0, 1, True),
        ("dense", 1, 3, True),
        ("layerwise", 0, 1, True),
    ],
)
def test_memory_of_a_refit(kind, rank, ranks, groups, dims, dtype, tmp_path, monkeypatch):
    world = SoloWorld(rank, ranks)
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**40)  # as on a GPU: in one go
    sizes = {
        "hidden_size": dims[0],
        "intermediate_size": dims[1],
        "num_hidden_layers": 3,
        "vocab_size": 264,
    }
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **sizes))
    units = {"neurons": [torch.arange(dims[1] // 2)] * 3, **({"kv_groups": [torch.arange(2)] * 3} if groups else {})}
    kept, windows = Kept.of_all_layers(units), torch.randint(264, (8 * ranks, 16))
    dense, pruned = (LayerStream(checkpoint, windows, dtype, 2, world) for _ in range(2))
    kinds = [checkpoint.structures[name] for name in units]
    fitted = RefittedLayers(checkpoint, kinds, kind == "block", tmp_path / "fitted")
    if kind == "dense":
        refit = DenseRefit(kept, dense, fitted, world)
    else:
        whose = {"residual": set(), "more_iterations": 2}
        refit = SequentialRefit(checkpoint.family, kept, pruned, dense, fitted, **whose, world=world)
    job = Refit(
        windows=2,
        tokens=16,
        samples=len(windows),
        pursues=kind != "dense",
        steps=kind == "block",
        searches=False,
        share_kept=0.5,
        itemsize=dtype.itemsize,
        kv_groups=groups,
    )
    with PeakBytes() as counted:
        refit.run(lambda done: None)
    expected = at_once(job.memory(dimensions_of(checkpoint.config), ranks))
    # In a step, the dense layer's weights are counted together with its sums, though they are gone by then.
    assert 0.72 * expected < counted.peak < 1.05 * expected


@pytest.mark.parametrize("kinds", [["neurons"], ["neurons", "kv_groups"]])
@pytest.mark.parametrize("dims", [(64, 1024), (256, 512)], ids=["wide", "square"])
def test_memory_of_the_cheap_refits_of_a_search(dims, kinds, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CACHE_BYTES", 2**40)  # as on a GPU: in one go
    checkpoint, stream = of_one_layer(tmp_path / "model", *dims)
    units = [checkpoint.structures[kind] for kind in kinds]
    fits = CheapFits([Scored(it, [torch.rand(it.counts[0])]) for it in units], stream, True, SoloWorld())
    layer = next(stream.layers([0]))[1]
    with PeakBytes() as counted:
        fits.weights(0, layer, [tuple(it.counts[0] - 1 for it in units), tuple(it.counts[0] // 2 for it in units)])
    shape = {"windows": 2, "tokens": 16, "samples": 16, "share_kept": 0.5, "itemsize": 4}
    job = Refit(**shape, pursues=False, steps=False, searches=True, kv_groups=len(kinds) > 1)
    assert 0.85 < counted.peak / at_once(job.memory(dimensions_of(checkpoint.config), 1)) < 1.05


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 3)])
@pytest.mark.parametrize(
    ("model_type", "sizes", "tokens"),
    [
        ("qwen3_moe", (64, 128, 8, 2), 16),  # Gram matrices dominate
        ("qwen3_moe", (256, 32, 16, 8), 128),  # copies of hidden states do
        ("glm4_moe", (128, 64, 16, 4), 64),
        ("gpt_oss", (64, 128, 8, 2), 16),
    ],
)
def test_memory_of_a_refit_of_experts(rank, ranks, model_type, sizes, tokens, tmp_path, monkeypatch):
    for module, name in ((gram, "BLOCK"), (blocks, "CACHE_BYTES")):
        monkeypatch.setattr(module, name, 2**40)  # as on a GPU: in one go
    checkpoint = mixture_in(tmp_path / "model", model_type, *sizes)
    windows, world = torch.randint(264, (8 * ranks, tokens)), SoloWorld(rank, ranks)
    kept, kinds = some_kept(checkpoint, 0.5), checkpoint.pruned_kinds(["neurons"])
    fitted = RefittedLayers(checkpoint, kinds, False, tmp_path / "fitted")
    refit = DenseRefit(kept, LayerStream(checkpoint, windows, torch.float32, 2, world), fitted, world)
    with PeakBytes() as counted:
        refit.run(lambda done: None)
    shape = {"windows": 2, "tokens": tokens, "samples": len(windows), "share_kept": 0.5, "itemsize": 4}
    job = Refit(**shape, pursues=False, steps=False, searches=False)
    dims = dimensions_of(checkpoint.config)
    waits = job.host_bytes(dims, ranks) - replace(job, samples=8).host_bytes(dims, 1)
    assert (waits > 0) == (ranks > 1), "in main memory"
    assert 0.8 < counted.peak / (at_once(job.memory(dims, ranks)) + waits) < 1.1


def mixture_in(folder, model_type, *sizes):
    """Open a model all of whose layers have experts: hidden size, width, number of experts, experts per token."""
    number = {"gpt_oss": "num_local_experts", "glm4_moe": "n_routed_experts"}.get(model_type, "num_experts")
    names = "hidden_size", "intermediate_size", number, "num_experts_per_tok"
    settings = dict(zip(names, sizes, strict=True)) | {"vocab_size": 264, "max_position_embeddings": 512}
    others = {"qwen3_moe": {"mlp_only_layers": []}, "glm4_moe": {"first_k_dense_replace": 0}}.get(model_type, {})
    others |= {} if model_type == "gpt_oss" else {"moe_intermediate_size": sizes[1]}
    return open_checkpoint(save_model(folder, model_type, **settings, **others))


@pytest.mark.parametrize("dims", [(32, 1024), (128, 512)], ids=["wide", "square"])
def test_memory_of_an_elimination(dims, monkeypatch):
    monkeypatch.setattr(elimination, "WAITING", 1)  # so that what waits is as little as in wide layers
    hidden_size, size = dims
    hidden_ND, gradient_NC = torch.randn(2 * size, size), torch.randn(2 * size, hidden_size)
    gram_DD, curvature_CC = (it.T.double() @ it.double() / len(it) for it in (hidden_ND, gradient_NC))
    with PeakBytes() as counted:
        elimination.elimination_scores(gram_DD, curvature_CC, torch.randn(hidden_size, size), torch.rand(size))
    assert 0.95 < counted.peak / (importance_footprint.ELIMINATION_BYTES * size**2) < 1.15


def test_refits_keep_hidden_states_of_their_windows_on_the_host():
    job = Refit(2, 512, 64, pursues=True, steps=True, searches=False, share_kept=0.5)
    states = 16 * 512 * 4096
    pinned = (4 * 2 + 2 * 4) * 2 * 512 * 4096 + 2 * 2 * 2**25  # targets come back in float32
    assert job.host_bytes(published("7B"), 4) == (3 * 2 + 4) * states + pinned
    assert replace(job, kv_groups=True).host_bytes(published("7B"), 4) == (4 * 2 + 4) * states + pinned


@pytest.mark.parametrize(("samples", "layers"), [(24, 12), (24, 5), (3, 9)])
def test_refits_of_norms_keep_hidden_states_before_all_layers_on_the_host(tmp_path, monkeypatch, samples, layers):
    monkeypatch.setattr(layer_pass_footprint, "NORM_TOKENS", 16 * 256)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": layers, "vocab_size": 264}
    checkpoint, world = open_checkpoint(save_tiny(tmp_path / "model", **sizes)), SoloWorld()
    batches = dict(enumerate(torch.randint(264, (min(samples, 16), 256)).split(2)))
    dense = dense_outputs(checkpoint, batches, torch.float32, world, lambda _done: None)
    pruned = PrunedLayers(checkpoint, Kept(tuple(range(layers))), {}, torch.float32, world.device)
    gradients = NormGradients(pruned, batches, dense, world=world, after_each=lambda _done: None)
    with PeakBytes() as counted:
        gradients.at(torch.ones(gradients.shape, dtype=torch.float64))
    job = Refit(2, 256, samples, pursues=True, steps=False, searches=False, share_kept=0.5, itemsize=4, norms=True)
    dims = dimensions_of(checkpoint.config)
    states = job._before_layers(dims, 1)
    at_head = 2 * 256 * (5 * 264 + 6 * 64) * 4  # both logits, copies of them, a gradient; and states
    dense_states = sum(it.nbytes for it in dense.values())
    assert 0.9 < (counted.peak + dense_states) / (states + at_head) < 1.05
    assert job.host_bytes(dims, 1) == states + pinned_bytes(dims, 2 * 256, 4, models=2)
    assert replace(job, samples=2**20).host_bytes(dims, 1) == replace(job, samples=2**20, norms=False).host_bytes(
        dims, 1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(64, 1024), (128, 384)], ids=["wide", "usual"])
def test_memory_of_a_refit_of_norms(dims, dtype, tmp_path):
    sizes = {"hidden_size": dims[0], "intermediate_size": dims[1], "num_hidden_layers": 1, "vocab_size": 264}
    checkpoint, world = open_checkpoint(save_tiny(tmp_path / "model", **sizes)), SoloWorld()
    batches = {0: torch.randint(264, (2, 512))}
    dense = dense_outputs(checkpoint, batches, dtype, world, lambda _done: None)
    with PeakBytes() as counted:
        pruned = PrunedLayers(checkpoint, Kept((0,)), {}, dtype, world.device)
        gradients = NormGradients(pruned, batches, dense, world=world, after_each=lambda _done: None)
        gradients.at(torch.ones(gradients.shape, dtype=torch.float64))
    job = Refit(2, 512, 2, pursues=True, steps=False, searches=False, share_kept=0.1, itemsize=dtype.itemsize)
    size, refit = dimensions_of(checkpoint.config), replace(job, norms=True)
    expected = at_once(refit.memory(size, 1))
    assert 0.85 < counted.peak / (expected + refit._before_layers(size, 1)) < 1.05
    assert expected > 1.15 * at_once(job.memory(size, 1))
    many = replace(job, windows=1, tokens=8, share_kept=0.9)  # where sums need more
    assert replace(many, norms=True).memory(size, 1) == many.memory(size, 1)


def test_copies_are_windows_of_a_refit_alone():
    job = Refit(2, 512, 64, pursues=True, steps=True, searches=False, share_kept=0.5, norms=True)
    dims = published("7B")
    copied, larger = replace(job, copies=3), replace(job, samples=256)
    for ranks in (1, 8):
        assert copied.memory(dims, ranks) == larger.memory(dims, ranks)
        without = [replace(it, norms=False).host_bytes(dims, ranks) for it in (copied, larger, job)]
        assert without[0] == without[1] > without[2]
        assert copied.host_bytes(dims, ranks) == max(without[0], job.host_bytes(dims, ranks))
    head = replace(dims, vocabulary=2**24)
    assert replace(copied, norms=False).memory(head, 1).sums > replace(job, norms=False).memory(head, 1).sums


@pytest.mark.parametrize("biases", [False, True])
def test_memory_of_a_reference(tmp_path, biases):
    """Each rank has its own windows: hidden states on the host, a layer and a micro-batch on the GPU. Means of channels
    on the way, from which biases are made, need no more memory.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 264}
    checkpoint, windows = open_checkpoint(save_tiny(tmp_path / "model", **sizes)), torch.randint(264, (8, 64))
    stream = LayerStream(checkpoint, windows, torch.float32, 2, SoloWorld())
    with PeakBytes() as counted:
        for number, layer in stream.layers(range(3)):
            if biases:
                stream.channel_means(number, layer, list(checkpoint.structures.values()))
            else:
                stream.advance(layer)
            del layer
    job = Reference(windows=2, tokens=64, samples=8, itemsize=4)
    dims = dimensions_of(checkpoint.config)
    states = windows.numel() * 64 * 4
    assert job.host_bytes(dims, 1) == states + pinned_bytes(dims, 2 * 64, 4)
    assert 0.7 < counted.peak / (at_once(job.memory(dims, 1)) + states) < 1.05


@pytest.mark.parametrize("dims", [(32, 512, 64), (128, 160, 16)], ids=["wide", "square"])
def test_memory_of_a_low_rank_pass(dims, tmp_path):
    """With long micro-batches, what layers read dominates; otherwise, eigenvectors do."""
    hidden_size, width, tokens = dims
    sizes = {"hidden_size": hidden_size, "intermediate_size": width, "num_hidden_layers": 2, "vocab_size": 264}
    checkpoint, windows = open_checkpoint(save_tiny(tmp_path / "model", **sizes)), torch.randint(264, (8, tokens))
    ranks, world = {"self_attn.q_proj": hidden_size // 4, "self_attn.o_proj": hidden_size // 4}, SoloWorld()
    stream, whole = (LayerStream(checkpoint, it, torch.float32, 2, world) for it in (windows, windows[:2]))
    layers = LowRankLayers(checkpoint, list(ranks), tmp_path / "layers")
    low_rank = LowRankPass(
        checkpoint, Sizes(width // 2, ranks, lowest_stay=True), stream, layers, whole=whole, world=world
    )
    with PeakBytes() as counted:
        low_rank.run(lambda done: None)
    job = LowRank(windows=2, tokens=tokens, samples=8, itemsize=4)
    dims = dimensions_of(checkpoint.config)
    states = (windows.numel() + 2 * tokens) * hidden_size * 4
    assert job.host_bytes(dims, 1) == states + pinned_bytes(dims, 2 * tokens, 4)
    assert 0.5 < counted.peak / (at_once(job.memory(dims, 1)) + states) < 1.05


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", ["reference", "dense", "layerwise", "block"])
def test_what_is_on_its_way_in_a_layer_pass(kind, ranks, tmp_path):
    """Besides what is computed with, each rank has a layer, a micro-batch and a result, and pinned host memory."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 264}
    checkpoint, windows = open_checkpoint(save_tiny(tmp_path / "model", **sizes)), torch.randint(264, (8, 11))
    dims, shape = dimensions_of(checkpoint.config), {"windows": 2, "tokens": 11, "samples": 8, "itemsize": 4}
    kept = Kept.of_all_layers({"neurons": [torch.arange(48)] * 4})

    def work(world):
        streams = [LayerStream(checkpoint, windows, torch.float32, 2, world) for _ in range(1 + (kind != "dense"))]
        if kind == "reference":
            for _, layer in streams[0].layers(range(4)):
                streams[0].advance(layer)
                del layer
            return
        fitted = RefittedLayers(checkpoint, [checkpoint.structures["neurons"]], kind == "block", tmp_path / "fitted")
        if kind == "dense":
            DenseRefit(kept, *streams, fitted, world).run(lambda _done: None)
        else:
            options = {"residual": set(), "more_iterations": 2, "world": world}
            SequentialRefit(checkpoint.family, kept, *streams, fitted, **options).run(lambda _done: None)

    with lanes() as made:
        Ranks(ranks).run(work)
    pursues = kind in ("layerwise", "block")
    options = {"pursues": pursues, "steps": kind == "block", "searches": False, "share_kept": 0.5}
    job = Reference(**shape) if kind == "reference" else Refit(**shape, **options)
    micro_batch, layer = 2 * 11 * 64 * 4, dims.layer_parameters * 4
    unsolved = 64 * 96 * 4 if kind == "dense" and ranks > 1 else 0  # of a layer that waits to be solved
    assert max(fake.most[WEIGHTS] for fake in made) == pytest.approx(2 * layer + unsolved, rel=0.01), "norms aside"
    most = {way: max(fake.most[way] for fake in made) for way in made[0].most}
    at_a_time = 2 if ranks < 4 else 1  # no more than a rank has micro-batches
    assert most[TO_HOST] == at_a_time * micro_batch and most[f"pinned {TO_HOST}"] == at_a_time * 8192
    if kind != "block":  # whose steps keep inputs, and have targets sent along with them
        assert most[TO_DEVICE] == at_a_time * micro_batch and most[f"pinned {TO_DEVICE}"] == at_a_time * 8192
    models = 1 + pursues
    assert most[f"pinned {TO_DEVICE}"] <= 2 * models * 8192
    assert job.memory(dims, ranks).in_transit == models * layer + (1 + models) * micro_batch
    numbers = {"reference": 4, "dense": 4, "layerwise": 8, "block": 8 + 4 + 4}[kind]
    pinned = job.host_bytes(dims, ranks) - 8 * 11 // ranks * 64 * numbers
    # Weights of 64 * 96 numbers are smaller than PINNED_BYTES.
    assert pinned == (2 * models + 2) * 8192 + 2 * models * 2**15


def at_once(memory):
    """Return the memory on a CPU, where nothing is in transit."""
    return memory.total - memory.in_transit


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("sharded", [False, True])
def test_kept_activations_of_lora_training(monkeypatch, sharded, dropout):
    if sharded:
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    model = tiny_model("llama", **SHAPE).bfloat16()
    targets = lora_targets(FAMILIES["llama"])
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules=targets)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    job = Train(rows=2, tokens=128, rank=4, dropout=dropout > 0)
    dims = dimensions_of(model.config.to_dict())
    with kept_for_backward(adapted) as counted:
        adapted.base_model.model.model(torch.ones(2, 128, dtype=torch.int64), use_cache=False)
        assert 2 * 128 * dims.num_layers * job.layer_bytes(dims, sharded=sharded) == pytest.approx(counted(), rel=0.15)
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    assert job.lora_parameters(dims) == trained


WITH_EXPERTS = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 80, "num_experts_per_tok": 3}


def test_kept_activations_of_experts_in_the_calibration_pass(tmp_path):
    """The router's weights get gradients, for which experts' outputs are kept, except in the first layer."""
    checkpoint = open_checkpoint(save_model(tmp_path, "mixtral", **EXPERTS["mixtral"], **WITH_EXPERTS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    use_memory_efficient_backward(model, checkpoint.family)
    model_scored = ScoredModel(
        body=lambda input_ids: model.model(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((model.lm_head.weight, None)),
        outputs={"expert_neurons": UnitOutputs(see_experts(model, checkpoint.family), 1, experts=4)},
    )
    input_ids_BT = torch.randint(64, (2, 32))
    with kept_for_backward(model) as counted:
        sums = UnitSums(model_scored.outputs, [CRITERIA["entropy"]])
        score_batch(model_scored, Batch(input_ids_BT, range(2), 64, 0, TeacherSettings(0.4, 0.2)), sums)
        estimate = 2 * 32 * Importance(windows=2, tokens=32).activation_bytes(checkpoint_dimensions(checkpoint))
        assert estimate == pytest.approx(counted(), rel=0.1)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "qwen3_next"])
def test_generation_caches_what_attention_caches(tmp_path, model_type):
    """Latent vectors in place of keys and values; in a hybrid, nothing of layers without attention."""
    features = {**FEATURES, **EXPERTS, **MORE_EXPERTS}[model_type]
    checkpoint = open_checkpoint(save_model(tmp_path, model_type, **features))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        cache = model(input_ids=torch.randint(64, (2, 7)), use_cache=True).past_key_values
    held = sum(it.keys.nbytes + it.values.nbytes for it in cache.layers if getattr(it, "keys", None) is not None)
    settings = {"batch_sizes": [1, 2], "prompt_tokens": [3, 5], "new_tokens": 2, "repeats": 1, "dtype": "float32"}
    job = Generate.of(EfficiencyParameters(**settings, device="cpu", packages={}), checkpoint)
    dims = checkpoint_dimensions(checkpoint)
    assert job.memory(dims, 1).activations == held + 2 * 7 * 4 * widest(dims)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])  # the latter with a layer that has no experts
def test_lora_of_experts_is_that_of_attention(tmp_path, model_type):
    checkpoint = open_checkpoint(save_model(tmp_path, model_type, **EXPERTS[model_type]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=lora_targets(checkpoint.family))
    )
    trained = sum(it.numel() for it in adapted.parameters() if it.requires_grad)
    job = Train(rows=2, tokens=128, rank=4, dropout=False)
    assert job.lora_parameters(checkpoint_dimensions(checkpoint)) == trained


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("sharded", [False, True])
def test_kept_activations_of_experts_in_lora_training(tmp_path, monkeypatch, sharded, dropout):
    """Every expert that a token is given to has a copy of it."""
    checkpoint = open_checkpoint(save_model(tmp_path, "mixtral", **EXPERTS["mixtral"], **WITH_EXPERTS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    if sharded:
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    targets = lora_targets(checkpoint.family)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules=targets)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    job, dims = Train(rows=2, tokens=32, rank=4, dropout=dropout > 0), checkpoint_dimensions(checkpoint)
    with kept_for_backward(adapted) as counted:
        adapted.base_model.model.model(torch.randint(64, (2, 32)), use_cache=False)
        assert 2 * 32 * job.activation_bytes(dims, sharded=sharded) == pytest.approx(counted(), rel=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("sharded", [False, True])
def test_kept_activations_of_masked_units(monkeypatch, sharded, dropout):
    """Besides themselves, masks add one number per channel to the activations of LoRA training."""
    if sharded:
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    kept = []
    for masks in (False, True):
        model = tiny_model("llama", **SHAPE).bfloat16()
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules=lora_targets(FAMILIES["llama"])
        )
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
        structures = FAMILIES["llama"].structures(model.config.to_dict())
        shape = Shape((0, 1, 2, 3), {kind: tuple(it - masks for it in of.counts) for kind, of in structures.items()})
        UnitMasks(structures, shape).attach(adapted.get_base_model(), torch.device("cpu"), torch.bfloat16)
        with kept_for_backward(adapted) as counted:
            adapted.base_model.model.model(torch.ones(2, 128, dtype=torch.int64), use_cache=False)
            kept.append(counted())
    jobs = [Train(rows=2, tokens=128, rank=4, dropout=dropout > 0, masks=masks) for masks in (False, True)]
    dims = dimensions_of(model.config.to_dict())
    before, after = (2 * 128 * job.activation_bytes(dims, sharded=sharded) for job in jobs)
    assert kept[1] - kept[0] == after - before + 4 * 2 * (dims.intermediate_size + dims.attention_size)


def test_a_model_is_refused_where_it_does_not_fit_and_not_where_it_does():
    job, dims = Importance(windows=1, tokens=1024), published("70B")
    assert not fits(job, dims, Gpus(nodes=1, per_node=1, memory=80 * GIB))
    assert fits(job, dims, Gpus(nodes=1, per_node=8, memory=80 * GIB))
    assert fits(Evaluate(8, 1024), published("7B"), Gpus(nodes=1, per_node=1, memory=80 * GIB))


def test_more_ranks_need_less_memory_each_and_more_windows_more():
    dims, job = published("13B"), Importance(windows=1, tokens=1024)
    totals = [job.memory(dims, ranks).total for ranks in (2, 8, 64)]
    assert totals == sorted(totals, reverse=True)
    assert Importance(windows=4, tokens=1024).memory(dims, 8).total > totals[1]


@pytest.mark.parametrize(("experts", "billions"), [(8, 1.0), (128, 128 * 3 * 4096 * 1536 / 1e9)])
def test_all_experts_of_a_layer_are_gathered_together(experts, billions):
    """Layers of Qwen3-235B-A22B; with few experts, DeepSpeed gathers as far ahead as it may."""
    layers = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64}
    routed = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}
    dims = dimensions_of(layers | routed | {"vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128})
    gathered = 2 * (billions * 1e9 + dims.head_parameters)
    jobs = Importance(windows=1, tokens=1024), Train(1, 1024, rank=8, dropout=False), Evaluate(1, 1024)
    assert {job.memory(dims, 16).gathered for job in jobs} == {gathered}
    assert {job.memory(dims, 1).gathered for job in jobs} == {0.0}

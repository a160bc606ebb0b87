"""Memory formulas against the bytes that small models take: enough with the margin, and not much more than that."""

import contextlib
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from families import EXPERTS, save_model
from families import FAMILIES as LLAMA_LIKE
from mixtures import some_kept
from more_families import MORE_EXPERTS
from peak_bytes import PeakBytes
from peft import LoraConfig, get_peft_model
from ranks import SoloWorld
from tiny import FAMILY, save_tiny, tiny_model
from torch.nn import functional
from transformers import AutoModelForCausalLM
from unit_outputs import unit_outputs

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.core import head, portions
from hfprune_dist.core.head import Batch
from hfprune_dist.core.score_batch import ScoredModel, UnitSums, score_batch
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.kinds import evaluate, importance
from hfprune_dist.kinds.dimensions import checkpoint_dimensions, dimensions_of
from hfprune_dist.kinds.efficiency import EfficiencyParameters, Generate
from hfprune_dist.kinds.evaluate import Evaluate, EvaluateParameters
from hfprune_dist.kinds.importance import Calibration
from hfprune_dist.kinds.memory import GIB, MARGIN, Gpus, fits, widest_of_a_token
from hfprune_dist.kinds.prune import Refitting
from hfprune_dist.kinds.training import Train
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.memory_efficient_backward import checkpoint_activations, use_memory_efficient_backward
from hfprune_dist.refit.dense_refit import DenseRefit
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.structures.kept import Kept

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "vocab_size": 264}
LLAMAS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
DIMS = {name: dimensions_of(config | {"vocab_size": 32000}) for name, config in LLAMAS.items()}
# Llama 3.2's.
ONE_BILLION = dimensions_of(
    {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
)


def check(formula, counted, at_most=1.4):
    """Counted bytes fit what a GPU should have by the formula, which is not far above them."""
    assert counted <= MARGIN * formula and formula <= at_most * counted, (formula, counted, formula / counted)


@pytest.fixture
def small_portions(monkeypatch):
    """Portions whose size doesn't grow with a model would hide everything else of one this small."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(portions, "CACHE_BYTES", 2**12 // torch.get_num_threads())
    for name in ("HEAD_BYTES", "ACCELERATOR_BYTES"):
        monkeypatch.setattr(importance, name, 0)


@pytest.mark.parametrize(
    ("variant", "criteria", "kinds", "checkpointing"),
    [
        ("llama", ["entropy"], ("neurons",), False),
        ("llama", ["entropy", "fisher_signs"], ("neurons", "kv_groups"), True),
        ("qwen2", ["entropy", "fisher_signs"], ("neurons", "kv_groups"), False),
    ],
)
def test_a_calibration_pass(small_portions, variant, criteria, kinds, checkpointing):
    model = tiny_model(variant, **SHAPE).bfloat16().requires_grad_(False)
    family = FAMILY
    use_memory_efficient_backward(model, family)
    if checkpointing:
        checkpoint_activations(model, family)
    structures, last = family.structures(model.config.to_dict()), family.head_of(model)
    scored = ScoredModel(
        body=lambda input_ids: family.body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((last.weight, last.bias)),
        outputs={kind: unit_outputs(structures[kind], model) for kind in kinds},
    )
    sums = UnitSums(scored.outputs, [CRITERIA[name] for name in criteria])
    with PeakBytes() as counted:
        batch = Batch(torch.ones(2, 48, dtype=torch.int64), range(2), 264, 0, (0.4, 0.2))
        score_batch(scored, batch, sums)
    job = Calibration(2, 48, losses=len(criteria), kv_groups=len(kinds) > 1, checkpointing=checkpointing)
    check(job.memory(dimensions_of(model.config.to_dict()), 1).total, counted.peak)


@pytest.mark.parametrize(
    ("refit", "rank", "ranks"), [("none", 0, 1), ("dense", 0, 1), ("dense", 1, 3), ("layerwise", 0, 1), ("block", 0, 1)]
)
def test_a_pass_layer_by_layer(tmp_path, monkeypatch, refit, rank, ranks):
    dims = 64, 1024
    monkeypatch.setattr(portions, "CACHE_BYTES", 2**40)  # as on a GPU: in one go
    sizes = dict(zip(("hidden_size", "intermediate_size"), dims, strict=True))
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **sizes, num_hidden_layers=3, vocab_size=264))
    world, windows = SoloWorld(rank, ranks), torch.randint(264, (8 * ranks, 16))
    kept = Kept.of_all_layers({"neurons": [torch.arange(dims[1] // 2)] * 3})
    dense, pruned = (LayerStream(checkpoint, windows, torch.float32, 2, world) for _ in range(2))
    fitted = RefittedLayers(checkpoint, [checkpoint.structures["neurons"]], refit == "block", tmp_path / "fitted")
    with PeakBytes() as counted:
        if refit == "none":
            for _, layer in dense.layers(range(3)):
                dense.advance(layer)
                del layer
        elif refit == "dense":
            DenseRefit(kept, dense, fitted, world).run(lambda _done: None)
        else:
            options = {"more_iterations": 2, "world": world}
            SequentialRefit(checkpoint.family, kept, pruned, dense, fitted, **options).run(lambda _done: None)
    job = Refitting(2, 16, 4, samples=len(windows), refit=refit, share_kept=0.5)
    size = checkpoint_dimensions(checkpoint)
    # On a CPU, the next layers are not on their way yet, and hidden states are counted, too.
    formula = job.memory(size, ranks)
    check(formula.total - formula.weights / 2 + job.host_bytes(size, ranks), counted.peak, at_most=1.7)


def test_a_refit_of_experts(tmp_path, monkeypatch):
    sizes = 64, 128, 8, 2
    monkeypatch.setattr(portions, "CACHE_BYTES", 2**40)
    names = "hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok"
    settings = dict(zip(names, sizes, strict=True)) | {"intermediate_size": sizes[1], "mlp_only_layers": []}
    checkpoint = open_checkpoint(save_model(tmp_path / "model", "qwen3_moe", **settings, vocab_size=264))
    windows, world = torch.randint(264, (8, 32)), SoloWorld()
    fitted = RefittedLayers(checkpoint, checkpoint.pruned_kinds(["neurons"]), False, tmp_path / "fitted")
    stream = LayerStream(checkpoint, windows, torch.float32, 2, world)
    with PeakBytes() as counted:
        DenseRefit(some_kept(checkpoint, 0.5), stream, fitted, world).run(lambda _done: None)
    job, dims = Refitting(2, 32, 4, samples=8, refit="dense", share_kept=0.5), checkpoint_dimensions(checkpoint)
    formula = job.memory(dims, 1)
    check(formula.total - formula.weights / 2 + job.host_bytes(dims, 1), counted.peak, at_most=1.7)


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


@pytest.mark.parametrize(
    ("model_type", "sharded", "dropout"), [("llama", False, 0.05), ("llama", True, 0.05), ("mixtral", False, 0.0)]
)
def test_lora_training(tmp_path, monkeypatch, model_type, sharded, dropout):
    if model_type == "llama":
        save_tiny(tmp_path, **SHAPE)
    else:
        widths = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 80, "num_experts_per_tok": 3}
        save_model(tmp_path, "mixtral", **EXPERTS["mixtral"], **widths)
    checkpoint = open_checkpoint(tmp_path)
    if sharded:
        monkeypatch.setattr(functional, "linear", zero3_linear_wrap)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    targets = lora_targets(checkpoint.family)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules=targets)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    job, dims = Train(2, 64, rank=4, dropout=dropout > 0), checkpoint_dimensions(checkpoint)
    with kept_for_backward(adapted) as counted:
        adapted.base_model.model.model(torch.randint(64, (2, 64)), use_cache=False)
        assert 2 * 64 * dims.num_layers * job.layer_bytes(dims, sharded=sharded) == pytest.approx(counted(), rel=0.15)
    assert job.lora_parameters(dims) == sum(it.numel() for it in adapted.parameters() if it.requires_grad)


def evaluation(window=256, positions=131072, **settings):
    given = EvaluationConfig(**settings).model_dump(exclude={"include_path", "fidelity"})
    return Evaluate.of(EvaluateParameters(**given), window, positions)


def logits_of(tokens, dims):
    """What logits of this many tokens take at once, and their log-softmax."""
    return tokens * dims.vocabulary * (2 + 2 * 4)


@pytest.mark.parametrize(("tokens", "shots"), [(256, 0), (900, 5), (9000, None)])
def test_an_evaluation_has_room_for_long_requests(tokens, shots):
    """Whatever windows of text it compares, and with examples in prompts: batches of long requests are smaller."""
    job = evaluation(tasks=["piqa"], batch_size=8, num_fewshot=shots)
    at_a_time = max(1, min(8, evaluate.LOGITS_BYTES // logits_of(tokens, ONE_BILLION)))
    if at_a_time > 1 or tokens <= job.tokens:
        assert job.memory(ONE_BILLION, 1).temporary >= 0.8 * logits_of(at_a_time * tokens, ONE_BILLION)
    assert job.memory(ONE_BILLION, 1).total / GIB > 6, "a window of 256 tokens needs 2.7"
    assert evaluation(tasks=[]).memory(ONE_BILLION, 1).total / GIB < 3
    assert evaluation(tasks=["piqa"], batch_size=1, positions=300).memory(ONE_BILLION, 1).total / GIB < 3


@pytest.mark.parametrize("model_type", ["llama", "qwen3_next"])
def test_generation_caches_what_attention_caches(tmp_path, model_type):
    """In a hybrid, nothing of layers without attention."""
    folder = save_model(tmp_path, model_type, **{**LLAMA_LIKE, **MORE_EXPERTS}[model_type])
    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        cache = model(input_ids=torch.randint(64, (2, 7)), use_cache=True).past_key_values
    held = sum(it.keys.nbytes + it.values.nbytes for it in cache.layers if getattr(it, "keys", None) is not None)
    settings = {"batch_sizes": [1, 2], "prompt_tokens": [3, 5], "new_tokens": 2, "repeats": 1, "dtype": "float32"}
    job = Generate.of(EfficiencyParameters(**settings, device="cpu", packages={}), checkpoint)
    dims = checkpoint_dimensions(checkpoint)
    assert job.memory(dims, 1).activations == held + 2 * 7 * 4 * widest_of_a_token(dims)


JOBS = [
    Calibration(1, 1024, samples=64),
    Calibration(1, 1024, samples=64, curvature=True, kv_groups=True),
    Calibration(1, 1024, samples=64, weight_gradients=True),
    Refitting(1, 1024, samples=64, refit="block", searches=True, norms=True),
    Refitting(1, 1024, samples=64, low_rank=True),
    Train(1, 1024, rank=32, dropout=True),
    Train(1, 1024, rank=32, distills=True),
    Evaluate(1, 1024, positions=4096, window=1024),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_more_at_a_time_takes_more_and_more_ranks_take_no_more(job):
    for dims in DIMS.values():
        of_ranks = [job.memory(dims, ranks).total for ranks in (2, 8, 64)]
        assert of_ranks == sorted(of_ranks, reverse=True)
        assert replace(job, batch=64).memory(dims, 8).total > of_ranks[1]
        assert replace(job, batch=64).host_bytes(dims, 8) >= job.host_bytes(dims, 8) >= 0


@pytest.mark.parametrize(("experts", "billions"), [(8, 1.0), (128, 128 * 3 * 4096 * 1536 / 1e9)])
def test_all_experts_of_a_layer_are_gathered_together(experts, billions):
    """Layers of Qwen3-235B-A22B; with few experts, DeepSpeed gathers as far ahead as it may."""
    layers = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94, "num_attention_heads": 64}
    routed = {"num_experts": experts, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}
    dims = dimensions_of(layers | routed | {"vocab_size": 151936, "num_key_value_heads": 4, "head_dim": 128})
    weights = Calibration(1, 1024).memory(dims, 16).weights
    assert weights == 2 * (dims.parameters / 16 + billions * 1e9 + dims.head_parameters)


def test_a_model_is_refused_where_it_does_not_fit_and_not_where_it_does():
    one, eight = (Gpus(nodes=1, per_node=count, memory=80 * GIB) for count in (1, 8))
    assert not fits(JOBS[0], DIMS["70B"], one) and fits(JOBS[0], DIMS["70B"], eight)
    assert fits(JOBS[3], DIMS["7B"], one) and fits(Evaluate(8, 1024, positions=4096), DIMS["7B"], one)

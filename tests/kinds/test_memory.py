"""What stages need of each GPU, against the bytes that small models take: enough with the margin, not much more."""

import contextlib
import gc
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import save_model
from fine_tunings import make_task
from hypothesis import given
from hypothesis import strategies as st
from mixtures import some_kept
from peak_bytes import PeakBytes
from peft import LoraConfig, get_peft_model
from ranks import SoloWorld, on_ranks
from tiny import FAMILY, save_tiny, tiny_model
from transformers import AutoModelForCausalLM
from unit_outputs import seen_units

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.config.schema import EvaluationConfig
from hfprune_dist.config.texts import CalibrationConfig
from hfprune_dist.config.training import Training
from hfprune_dist.core import head, portions
from hfprune_dist.core.head import Batch
from hfprune_dist.core.observers import UnitSums
from hfprune_dist.core.score_batch import ScoredModel, score_batch
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.kinds import importance, prune, training
from hfprune_dist.kinds.evaluate import EvaluateParameters
from hfprune_dist.kinds.importance import ImportanceParameters
from hfprune_dist.kinds.memory import GIB, MARGIN, Gpus, Need, Placement, Planned, Sizes, passes, place
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.training import training_need
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.memory_efficient_backward import checkpoint_activations, use_memory_efficient_backward
from hfprune_dist.refit.measurement import PrunedLayers
from hfprune_dist.refit.norms_refit import NormGradients
from hfprune_dist.refit.output_refit import refit_on_dense
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.scoring import accumulation, shard_scorer
from hfprune_dist.scoring.accumulation import Accumulation, bytes_of
from hfprune_dist.scoring.shard_scorer import summed_matrices
from hfprune_dist.store.stage import Stage
from hfprune_dist.structures.kept import Kept
from hfprune_dist.training.snapshot import Snapshot
from hfprune_dist.training.trainer import Trainer

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "vocab_size": 264}


def check(formula, counted, at_most=1.4):
    """Counted bytes fit what a GPU should have by the formula, which is not far above them."""
    assert counted <= MARGIN * formula and formula <= at_most * counted, (formula, counted, formula / counted)


def scoring(criteria, kinds, samples, rows, tokens, dtype="bfloat16"):
    calibration = CalibrationConfig(samples=samples, micro_batch_size=rows, sequence_length=tokens)
    settings = {"criteria": criteria, "structures": kinds, "dtype": dtype, "add_bos_token": False, "seed": 0}
    return ImportanceParameters(calibration=calibration, **settings)


@pytest.mark.parametrize(
    ("criteria", "kinds", "checkpointing"),
    [
        (["entropy"], ["neurons"], False),
        (["entropy", "fisher_signs"], ["neurons", "kv_groups"], True),
        (["entropy", "fisher_signs"], ["neurons", "kv_groups"], False),
    ],
)
def test_a_calibration_pass(tmp_path, monkeypatch, criteria, kinds, checkpointing):
    # Portions whose size doesn't grow with a model would hide everything else of one this small.
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(portions, "CACHE_BYTES", 2**12 // torch.get_num_threads())
    for name in ("HEAD_BYTES", "ACCELERATOR_BYTES"):
        monkeypatch.setattr(importance, name, 0)
    model = tiny_model(**SHAPE).bfloat16().requires_grad_(False)
    use_memory_efficient_backward(model, FAMILY)
    if checkpointing:
        checkpoint_activations(model, FAMILY)
    structures, last = FAMILY.structures(model.config.to_dict()), FAMILY.head_of(model)
    scored = ScoredModel(
        body=lambda input_ids: FAMILY.body_of(model)(input_ids=input_ids, use_cache=False).last_hidden_state,
        head=lambda: contextlib.nullcontext((last.weight, last.bias)),
    )
    sums = UnitSums(seen_units(model, [structures[kind] for kind in kinds]), [CRITERIA[name] for name in criteria])
    with PeakBytes() as counted:
        batch = Batch(torch.ones(2, 48, dtype=torch.int64), range(2), 264, 0, (0.4, 0.2))
        score_batch(scored, batch, sums)
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **SHAPE))
    need = scoring(criteria, kinds, 2, 2, 48).passes_over(checkpoint, 2, 48, 2, checkpointing=checkpointing)
    check(need.on_each_gpu(1, whole=True) / MARGIN, counted.peak)


@pytest.mark.parametrize("kinds", [["neurons"], ["neurons", "kv_groups"]])
def test_matrices_of_a_calibration_pass(tmp_path, monkeypatch, kinds):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **SHAPE))
    reduced, limit = [], 2**60
    for _ in range(3):  # with inputs of output projections; without; and too large for any rank to have all terms
        for module in (importance, accumulation, shard_scorer):
            monkeypatch.setattr(module, "OWN_TERMS_BYTES", limit)
        matrices = summed_matrices(checkpoint, checkpoint.pruned_kinds(kinds), [CRITERIA["surgeon"]])
        reduced.append(Accumulation(1, tmp_path / "sums", SoloWorld(size=2), matrices)._has_own_terms)
        need = scoring(["surgeon"], kinds, 2, 2, 48).passes_over(checkpoint, 2, 48, 2, checkpointing=False)
        everything = bytes_of(matrices)
        assert (need.shared, need.unreduced) == (everything, everything if reduced[-1] else 0)
        limit = everything - 1
    assert reduced == [True, True, False]
    assert need.on_each_gpu(1, whole=True) == replace(need, unreduced=1).on_each_gpu(1, whole=True)


@pytest.mark.parametrize("refit", ["dense", "block", "experts"])
def test_a_refit_layer_by_layer(tmp_path, monkeypatch, refit):
    monkeypatch.setattr(portions, "CACHE_BYTES", 2**40)  # as on a GPU: in one go
    monkeypatch.setattr(prune, "HEAD_BYTES", 0)
    folder, world, tokens = tmp_path / "model", SoloWorld(), 16
    if refit == "experts":
        sizes = {"hidden_size": 64, "moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
        save_model(folder, "qwen3_moe", **sizes, intermediate_size=128, mlp_only_layers=[], vocab_size=264)
    else:
        save_tiny(folder, hidden_size=64, intermediate_size=1024, num_hidden_layers=3, vocab_size=264)
    checkpoint, windows = open_checkpoint(folder), torch.randint(264, (8, tokens))
    kinds = checkpoint.pruned_kinds(["neurons"])
    kept = (
        some_kept(checkpoint, 0.5) if refit == "experts" else Kept.of_all_layers({"neurons": [torch.arange(512)] * 3})
    )
    dense, pruned = (LayerStream(checkpoint, windows, torch.float32, 2, world) for _ in range(2))
    fitted = RefittedLayers(checkpoint, tmp_path / "fitted")
    with PeakBytes() as counted:
        if refit == "block":
            SequentialRefit(kept, kinds, pruned, dense, fitted, iterations=(2, 2)).run(lambda _done: None)
        else:
            refit_on_dense(kept, kinds, dense, fitted, lambda _done: None)
    settings = {"allocation": "uniform", "multiple_of": 1, "dtype": "float32", "micro_batch_size": 2}
    name = "block" if refit == "block" else "dense"
    stages = [Stage("importance", "a", scoring(["entropy"], ["neurons"], 8, 2, tokens, "float32"), {})]
    params = PruneParameters(ratio=0.5, criterion="entropy", refit=name, **settings)
    stages.append(Stage("prune", "a", params, {"importance": stages[0].as_input()}))
    need = params.need(Planned(stages[1], {stages[0].id: stages[0]}, checkpoint, checkpointing=False))
    # On a CPU, the next layers are not on their way yet, and hidden states are counted, too.
    check(need.on_each_gpu(1, whole=True) / MARGIN - need.weights / 2 + need.host, counted.peak, at_most=1.9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_refit_of_norms(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(prune, "HEAD_BYTES", 0)
    shape = {**SHAPE, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "vocab_size": 16}
    checkpoint, windows = open_checkpoint(save_tiny(tmp_path / "model", **shape)), torch.randint(16, (4, 64))
    dense, stream = (LayerStream(checkpoint, windows, getattr(torch, dtype), 4, SoloWorld()) for _ in range(2))
    dense.run_layers(lambda _done: None)
    pruned = PrunedLayers(checkpoint, Kept((0, 1, 2)), {}, stream.reader)
    gradients = NormGradients(pruned, stream, dict(dense.final_hidden()), lambda _done: None)
    with PeakBytes() as counted:
        gradients.at(torch.ones(gradients.shape))
    settings = {"allocation": "uniform", "multiple_of": 1, "dtype": dtype, "micro_batch_size": 4}
    params = PruneParameters(ratio=0.5, criterion="entropy", refit="layerwise", **settings)
    need = params.passes_over(checkpoint, 4, 64, 4)
    check(need.activations + need.host + need.weights / 4, counted.peak)


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


@pytest.mark.parametrize(("model_type", "dropout"), [("llama", 0.0), ("llama", 0.05), ("mixtral", 0.0)])
def test_lora_training(tmp_path, model_type, dropout):
    if model_type == "llama":
        save_tiny(tmp_path, **SHAPE)
    else:
        widths = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 80, "num_experts_per_tok": 3}
        save_model(tmp_path, "mixtral", num_local_experts=4, **widths)
    checkpoint = open_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    targets = lora_targets(checkpoint.family)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules=targets)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    settings = Training(rank=4, dropout=dropout)
    need = training_need(settings, Sizes.from_checkpoint(checkpoint), 2, 64)
    with kept_for_backward(adapted) as counted:
        adapted.base_model.model.model(torch.randint(64, (2, 64)), use_cache=False)
        check(need.activations, counted())
    trained = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)
    logits = 2 * 64 * model.config.vocab_size * (2 + 3 * 4)
    assert need.temporary - logits == pytest.approx(24 * trained, rel=0.15)


def sizes_of(hidden, layers, neurons, parameters):
    """The sizes of a large model whose layers are alike."""
    sizes = {"attention": 4 * hidden, "heads": hidden, "neurons": neurons, "routed": 0, "mlp_channels": (neurons,)}
    return Sizes(hidden, layers, vocabulary=32000, parameters=parameters, layer=parameters // layers, **sizes)


def test_what_is_too_large_for_a_gpu_is_sharded_and_more_ranks_take_less(monkeypatch):
    monkeypatch.setattr(Sizes, "from_checkpoint", lambda sizes: sizes_of(*sizes))
    small, large = (4096, 32, 11008, 6.7e9), (8192, 80, 28672, 69e9)
    for model, whole in ((small, True), (large, False)):
        need = scoring(["entropy"], ["neurons"], 64, 1, 1024).passes_over(model, 64, 1024, 1, checkpointing=False)
        assert [place(need, Gpus(ranks, 80 * GIB), "auto").fits for ranks in (1, 8)] == [whole, True]
        of_ranks = [need.on_each_gpu(ranks, whole=False) for ranks in (2, 8, 64)]
        assert of_ranks == sorted(of_ranks, reverse=True)


def test_an_evaluation_has_room_for_long_requests(tmp_path):
    """Whatever windows of text it compares: batches of long requests are smaller, a single one is as long as it is."""
    checkpoint = open_checkpoint(save_tiny(tmp_path, **SHAPE, max_position_embeddings=131072))

    def logits(**settings):
        given = EvaluationConfig(**settings).model_dump(exclude={"include_path", "fidelity"})
        return EvaluateParameters(**given).forwards(checkpoint, 256).temporary

    assert logits(tasks=[]) == 256 * 264 * 10
    assert logits(tasks=["piqa"], batch_size=1) == 131072 * 264 * 10
    assert 3.9 * GIB < logits(tasks=["piqa"], batch_size=64) <= 4 * GIB


@given(
    parts=st.tuples(*[st.integers(1, 100)] * 4),
    trains=st.booleans(),
    count=st.integers(1, 16),
    gib=st.integers(8, 200),
    sharding=st.sampled_from(["auto", "replicate", "zero3"]),
)
def test_weights_are_whole_wherever_they_fit_and_layers_run_again_only_where_they_must(
    parts, trains, count, gib, sharding
):
    weights, activations, temporary, gathered = parts
    need = Need(weights, activations, temporary, gathered, again=activations / 2 if trains else None)
    way = place(need, Gpus(count, gib), sharding)
    assert way.needed == need.on_each_gpu(count, whole=way.whole, checkpointing=way.checkpointing)
    assert way.fits == (way.needed <= gib)
    if way.checkpointing:
        assert trains and not (way.fits and need.on_each_gpu(count, whole=way.whole) <= gib), "not without need"
    if sharding != "auto":
        assert way.whole == (sharding == "replicate")
    elif not way.whole:
        assert need.on_each_gpu(count, whole=True, checkpointing=trains) > gib


@given(
    parts=st.tuples(*[st.integers(1, 100)] * 4),
    host=st.integers(0, 400),
    count=st.integers(1, 16),
    gib=st.integers(8, 2000),
    most=st.integers(1, 20),
)
def test_as_many_windows_pass_at_once_as_fit_and_make_sense(parts, host, count, gib, most):
    weights, activations, temporary, gathered = parts
    gpus = Gpus(count, gib)

    def need(windows):
        return Need(weights, windows * activations, temporary, gathered, host=host)

    one, found = place(need(1), gpus, "auto"), passes(need, "auto", most, gpus, "auto")
    placed, more = (place(need(windows), gpus, "auto") for windows in (found.at_once, 2 * found.at_once))
    assert found.at_once == 1 or (placed.fits and placed.whole == one.whole and found.at_once <= most)
    assert not (more.fits and more.whole == one.whole and 2 * found.at_once <= most)
    assert found.stay == (placed.needed + host / count <= gib)
    assert passes(need, 3, most, gpus, "auto").at_once == 3


DISTILLED = {"method": "full", "objective": "distill"}


@pytest.mark.parametrize(("settings", "ranks"), [(DISTILLED, 1), (DISTILLED, 2), ({"method": "parts"}, 1)])
def test_training_in_place(tmp_path, settings, ranks, monkeypatch):
    """What is there at the peak of a step, and what stays: all weights and their gradients; ranks share the rest."""
    monkeypatch.setattr(head, "CHUNK_BYTES", 2**14)
    monkeypatch.setattr(training, "HEAD_BYTES", 2**17)
    shape = {"hidden_size": 320, "intermediate_size": 704, "num_hidden_layers": 4, "num_key_value_heads": 4}
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **shape))  # whose matrices DeepSpeed shards
    task = make_task(checkpoint, dtype="float32", micro_batch_size=2, **settings)
    task = replace(task, teacher=checkpoint if task.settings.teacher_share else None)
    sizes = Sizes.from_checkpoint(checkpoint)
    need = training_need(task.settings, sizes, 2, 24, has_teacher=task.teacher is not None)

    def count(world):
        with PeakBytes() as counted:
            trainer = Trainer(task, Snapshot(), world, Placement(True, False, fits=True))
            trainer.step(0)
            gc.collect()
        (tmp_path / str(world.rank)).write_text(f"{counted.peak} {counted.live}")

    assert on_ranks(ranks, count) == [0] * ranks
    # DeepSpeed gathers nothing on one rank.
    gathered = sizes.gathered * 4 if task.teacher and ranks == 1 else 0
    trained = training.trained_in_place(task.settings, sizes)
    held = need.weights + 4 * trained + (need.shared - 8 * trained) / ranks  # a step computes 8 bytes of each
    for rank in range(ranks):
        peak, live = map(int, (tmp_path / str(rank)).read_text().split())
        check(need.on_each_gpu(ranks, whole=True) / MARGIN - gathered, peak, at_most=1.6)
        assert live == pytest.approx(held, rel=0.02)


def test_a_7b_model_learns_from_itself_on_eight_gpus_with_all_weights():
    model, settings = sizes_of(4096, 32, 11008, 6.7e9), Training(method="full", objective="distill")
    need = training_need(settings, model, 4, 1024, has_teacher=True)
    assert place(need, Gpus(8, 80 * GIB), "auto").fits and not place(need, Gpus(1, 4 * 40 * GIB), "auto").fits
    assert place(need, Gpus(8, 80 * GIB), "zero3").whole
    with_lora = partial(training_need, Training(), model, row_tokens=1024)
    assert passes(with_lora, "auto", 16, Gpus(8, 80 * GIB), "auto").at_once >= 4

"""Stages on a pretended GPU: nothing mixes with main memory or runs out of order, the host waits only as noted here."""

import contextlib
import json
import threading
from dataclasses import replace
from functools import partial

import pytest
import shapes
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from evaluations import ALL_TASKS, evaluate_stage, write_inputs
from fine_tunings import make_task
from made_stages import stage_of
from pretended_gpu import CPU, GPU, MixedError, RefusedError, pretended_gpu
from ranks import SoloWorld, on_ranks, run_here
from refitting import (
    KINDS,
    MICRO_BATCH,
    checkpoint_in,
    nothing,
    refit,
    some_kept,
    to_prune,
    weights_in,
    windows_of,
)
from scoring import make_stage
from tiny import save_tiny, tiny_tokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.devices import to_host
from hfprune_dist.distributed import frozen_model
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.world import World
from hfprune_dist.evaluation.generation import Workload, peak_bytes, time_generation
from hfprune_dist.evaluation.sharded_lm import ShardedLM
from hfprune_dist.kinds.memory import Placement
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.methods import CRITERIA
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.bias_refit import find_biases
from hfprune_dist.refit.cheap_fits import Scored
from hfprune_dist.refit.low_rank import compress_layers
from hfprune_dist.refit.measurement import measure_shapes
from hfprune_dist.refit.norms_refit import NormGradients
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.scoring.accumulation import Accumulation
from hfprune_dist.scoring.shard_scorer import GivenStudent, ShardScorer, summed_matrices
from hfprune_dist.stages import importance, prune_refit
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.score_names import SCORES
from hfprune_dist.training.snapshot import Snapshot
from hfprune_dist.training.teacher_states import write_dense_states
from hfprune_dist.training.trainer import Trainer

WORLD, DTYPE = SoloWorld(device=GPU), torch.bfloat16
FEW, MANY = 2, 4  # layers


def raising(error):
    def fail(*_):
        raise error

    return fail


def test_what_a_gpu_would_refuse_is_found():
    with pretended_gpu() as gpu:
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        assert there.device == (there * 2).device == there[torch.tensor([0])].device == here.to(there).device == GPU
        assert there.cpu().device == here.device == torch.device("cpu")
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), there.numpy, lambda: here @ there):
            with pytest.raises(MixedError):
                mixed()
        for refused in (lambda: there.cumsum(0), lambda: there.long() @ there.long()):
            with pytest.raises(RefusedError):
                refused()
        gpu.waits.clear()
        assert float(there.sum()) == 3 and there[there > 0].tolist() == [1, 1, 1]
        assert sum(gpu.waits.values()) == 3


@pytest.mark.parametrize("read", [torch.Tensor.tolist, torch.Tensor.numpy, float, torch.stack])
def test_the_host_waits_before_it_reads_what_is_on_its_way(read):
    for waits in (True, False):
        with pretended_gpu() as gpu:
            number = to_host(2 * torch.ones((), device=GPU))
            if waits:
                torch.cuda.current_stream().synchronize()
            read([number] if read is torch.stack else number)
        assert bool(gpu.faults) != waits


# What is counted, for some number of layers: each in a folder of its own, with what is made before left out.


def scored(folder, layers, gpu, criteria, kinds=KINDS, variant="llama"):
    """The forward and backwards of one micro-batch."""
    checkpoint, _ = to_prune(folder / "model", variant, tuple(range(layers)), num_hidden_layers=layers)
    used = [CRITERIA[name] for name in criteria]
    matrices = summed_matrices(checkpoint, [checkpoint.structures[kind] for kind in kinds], used)
    totals = Accumulation(2, folder / "sums", WORLD, matrices) if matrices else None
    options = {"seed": 0, "world": WORLD, "structures": kinds, "totals": totals}
    if any(criterion.student_by for criterion in used):
        keeps = [torch.arange(count) > 2 for count in checkpoint.units.counts]
        options["student"] = GivenStudent(keeps, teacher=(0.4, 0.2))
    scorer = ShardScorer(checkpoint, DTYPE, windows_of(1), used, **options)
    with counting(gpu):
        scorer.score([range(1)])


def refitted(folder, layers, gpu, method, variant="llama", **options):
    sizes = {"num_hidden_layers": layers, "mlp_only_layers": []}
    checkpoint, kept = to_prune(folder / "model", variant, tuple(range(layers)), **sizes)
    with counting(gpu):
        refit(method, checkpoint, kept, folder / "refit", world=WORLD, windows_ST=windows_of(3), dtype=DTYPE, **options)


def answered(folder, layers, gpu):
    """A question of lm-eval's with four choices, which go on from its cache."""
    model = FrozenModel(checkpoint_in(folder / "model", layers=layers), DTYPE, "replicate", WORLD)
    lm = ShardedLM(model, tiny_tokenizer(), Interruption(), 1, add_bos_token=True)
    question, *choices = windows_of(5).tolist()
    with counting(gpu):
        lm._loglikelihood_tokens([(None, question, choice[:3]) for choice in choices])


def generated(folder, layers, gpu):
    model = FrozenModel(checkpoint_in(folder / "model", layers=layers), DTYPE, "replicate", WORLD).module
    prompts_BT = Workload(1, 8, 3).prompts(250, GPU)
    with counting(gpu):
        peak_bytes(partial(time_generation, model, prompts_BT, 3), GPU)


def task_of(checkpoint, goal):
    objective = "distill" if goal == "distillation" else "labels"
    task = make_task(checkpoint, dtype="bfloat16", dropout=0.05, micro_batch_size=8, objective=objective)
    if goal == "distillation":
        dense = torch.randn(8, 24, checkpoint.config["hidden_size"], dtype=DTYPE)
        return replace(task, rows=lambda row: {**task.rows(row), "dense": dense[row]})
    kinds = {kind: checkpoint.structures[kind].counts for kind in KINDS}
    fewer = {kind: tuple(count - 1 for count in counts) for kind, counts in kinds.items()}
    shape = Shape(tuple(range(checkpoint.num_layers)), fewer)
    return replace(task, masked_to=shape) if goal == "loraprune" else task


def trained(folder, layers, gpu, goal):
    """An optimizer step of one micro-batch."""
    place = Placement(whole=True, checkpointing=False, fits=True)
    training = Trainer(task_of(checkpoint_in(folder / "model", layers=layers), goal), Snapshot(), WORLD, place)
    with counting(gpu):
        training.step(0)


@contextlib.contextmanager
def counting(gpu):
    """Count the waits within, alone."""
    gpu.waits.clear()
    yield
    gpu.counted = sum(gpu.waits.values())


QWEN3_MOE = {"kinds": ["experts"], "variant": "qwen3_moe"}
# Name -> what runs; how often the host waits for the GPU for each layer, and besides.
CASES = {
    "entropy": (partial(scored, criteria=["entropy"], kinds=KINDS[:1]), 0, 2),
    "surgeon": (partial(scored, criteria=["surgeon"]), 0, 2),
    "llm-pruner": (partial(scored, criteria=["weight_taylor"]), 0, 2),
    "sdmprune": (partial(scored, criteria=["coupled_taylor"], kinds=KINDS[:1]), 0, 2),
    "distilled": (partial(scored, criteria=["coupled_taylor_distilled"], kinds=KINDS[:1]), 0, 2),
    "experts": (partial(scored, criteria=["entropy", "reap"], **QWEN3_MOE), 0, 2),
    "flap": (partial(scored, criteria=["fluctuation", "activation_l1"]), 0, 1),
    "dense refit": (partial(refitted, method="dense", stay=True), 4, 0),
    "experts' refit": (partial(refitted, method="dense", variant="qwen3_moe", stay=True), 5, 0),
    "layerwise refit": (partial(refitted, method="layerwise", stay=True), 5, 0),
    "block refit": (partial(refitted, method="block", variant="qwen3", stay=True), 8, 0),
    "lm-eval": (answered, 0, 1),
    "generation": (generated, 0, 3),
    "labels": (partial(trained, goal="labels"), 0, 2),
    "distillation": (partial(trained, goal="distillation"), 0, 2),
    "loraprune": (partial(trained, goal="loraprune"), 0, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_host_waits(tmp_path, name):
    (runs, *expected), found = CASES[name], []
    for layers in (FEW, MANY):
        with pretended_gpu() as gpu:
            runs(tmp_path / str(layers), layers, gpu)
        assert not gpu.faults
        found.append(gpu.counted)
    waits = (found[1] - found[0]) / (MANY - FEW)
    assert [waits, found[0] - FEW * waits] == expected, gpu.waits


# What is not counted.


@pytest.mark.parametrize(
    ("variant", "structures", "criteria"),
    [
        ("llama", KINDS, ["surgeon", "entropy", "fisher_signs", "fluctuation", "activation_l1", "weight_taylor"]),
        ("qwen3", KINDS[:1], ["cross_entropy", "coupled_taylor", "magnitude", "random"]),
    ],
)
def test_importance(tmp_path, variant, structures, criteria):
    store, text = Store(tmp_path / "store"), {"samples": 6, "sequence_length": 24, "shard_size": 2}
    stage = make_stage(tmp_path, variant, dtype="bfloat16", criteria=criteria, structures=structures, **text)
    with pretended_gpu() as gpu:
        run_here(store, stage, WORLD)
        if "coupled_taylor" in criteria:
            student = {"lacks": 0.1, "teacher_share": 0.4, "teacher_temperature": 0.2}
            second = make_stage(tmp_path, dtype="bfloat16", criteria=["coupled_taylor_distilled"], student=student)
            inputs = {**second.inputs, "student": stage.as_input()}
            run_here(store, stage_of("importance", "distilled", second.params, inputs), WORLD)
    assert not gpu.faults


def test_evaluation(tmp_path):
    """The host waits for fidelity's numbers once a window, and never to send what a window is compared with."""
    inputs, store = write_inputs(tmp_path), Store(tmp_path / "store")
    with pretended_gpu() as gpu:
        stage = evaluate_stage(store, inputs, ALL_TASKS, dtype="bfloat16", texts=("held-out", "news"), world=WORLD)
        gpu.waits.clear()
        run_here(store, stage, WORLD)
    waits = [place.split(", ")[1].split(":")[0] for place, count in gpu.waits.items() for _ in range(count)]
    assert waits.count("core/fidelity.py") == 2 * 5 and "stages/evaluate.py" not in waits and not gpu.faults


def test_efficiency(tmp_path):
    inputs, store = write_inputs(tmp_path), Store(tmp_path / "store")
    roles = {role: Input(role, str(inputs / role)) for role in ("dense", "model")}
    settings = {"prompt_tokens": [4, 9], "new_tokens": 3, "dtype": "bfloat16"}
    stage = stage_of("efficiency", "tiny", settings, roles)
    with pretended_gpu() as gpu:
        metrics = run_here(store, stage, WORLD)
    assert metrics["device"] == "pretended" and not gpu.faults


def test_windows_at_once_are_decided_by_the_memory_of_the_first_attempt(tmp_path, monkeypatch):
    many, store = {"dtype": "bfloat16", "structures": KINDS, "samples": 32}, Store(tmp_path / "store")
    auto, by_hand = (make_stage(tmp_path, micro_batch_size=size, **many) for size in ("auto", 4))
    with pretended_gpu():
        run_here(store, by_hand, WORLD)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
            patch.setattr(importance, "_stop_if_agreed", raising(RuntimeError("killed")))  # after a round
            run_here(store, auto, WORLD)
        monkeypatch.setattr(frozen_model, "free_bytes", lambda _world: 0.0)
        metrics = run_here(store, auto, WORLD)
    assert metrics["micro_batch_size"] == 4, "at least eight shards are left"
    ours, expected = ((store.handle(stage.id).artifact / SCORES).read_bytes() for stage in (auto, by_hand))
    assert ours == expected


@pytest.mark.parametrize("method", ["dense", "block"])
def test_hidden_states_may_stay_on_the_gpu(tmp_path, method):
    checkpoint, kept = to_prune(tmp_path / "model", "qwen3", (0, 1, 3))
    options = {"world": WORLD, "windows_ST": windows_of(19), "dtype": DTYPE, "micro_batch_size": 1, "merged": 2}
    with pretended_gpu() as gpu:
        for stay in (True, False):
            refit(method, checkpoint, kept, tmp_path / str(stay), stay=stay, **options)
    assert weights_in(tmp_path / "True") == weights_in(tmp_path / "False") and not gpu.faults


def test_experts_with_biases(tmp_path):
    checkpoint, kept = to_prune(tmp_path / "model", "gpt_oss", ())
    options = {"seed": 0, "world": WORLD, "structures": ["experts"]}
    with pretended_gpu() as gpu:
        used = [CRITERIA[name] for name in ("entropy", "reap")]
        ShardScorer(checkpoint, DTYPE, windows_of(1), used, **options).score([range(1)])
        refit("dense", checkpoint, kept, tmp_path / "refit", world=WORLD, windows_ST=windows_of(3), dtype=DTYPE)
    assert not gpu.faults


def stream_in(folder, variant="llama", size=MICRO_BATCH):
    return partial(LayerStream, checkpoint_in(folder / "model", variant), windows_of(5), DTYPE, size, WORLD)


def dense_states(stream):
    stream.run_layers(nothing)
    return dict(stream.final_hidden())


def test_measurements(tmp_path):
    checkpoint, make_stream = checkpoint_in(tmp_path / "model"), stream_in(tmp_path)
    units = [checkpoint.structures[kind] for kind in KINDS]
    kinds = [Scored(kind, [torch.arange(count).double() for count in kind.counts]) for kind in units]
    shapes = [
        Shape((0, 1), {"neurons": (11, 24), "kv_groups": (2, 4)}),
        Shape((0, 1, 2), {"neurons": (24, 13, 9), "kv_groups": (4, 1, 3)}),
    ]
    with pretended_gpu() as gpu:
        kls = measure_shapes(shapes, kinds, make_stream(), make_stream(), dense_states(make_stream()), nothing)
    assert all(kl > 0 for kl in kls) and not gpu.faults


def test_norms_are_refitted_on_as_many_windows_at_once_as_fit(tmp_path, monkeypatch):
    settings = {"allocation": "uniform", "structures": ["neurons"], "refit": "layerwise", "micro_batch_size": "auto"}
    store, stage = shapes.prepare(tmp_path, "qwen3", ratio=0.1, layers=2, samples=12, dtype="bfloat16", **settings)
    streams, stay = [], []

    def gradients_of(pruned, stream, *others):
        streams.append([len(states) for states in stream.states.values()])
        stay.extend(states.is_cuda for states in stream.states.values())
        return NormGradients(pruned, stream, *others)

    monkeypatch.setattr(PruneParameters, "refits_norms", True)
    monkeypatch.setattr(prune_refit, "NormGradients", gradients_of)
    with pretended_gpu() as gpu:
        metrics = run_here(store, stage, WORLD)
    assert streams == [[4, 4, 3], [1]] and all(stay) and not gpu.faults
    assert metrics["micro_batch_size"] == metrics["norms_micro_batch_size"] == 4


def test_biases_and_low_ranks(tmp_path):
    checkpoint, make_stream, kept = checkpoint_in(tmp_path / "model"), stream_in(tmp_path), some_kept((0, 1, 2))
    ranks = dict.fromkeys(checkpoint.family.attention_modules[:2], (8, 8, 8))
    biases, factors = (RefittedLayers(checkpoint, tmp_path / name) for name in ("biases", "factors"))
    with pretended_gpu() as gpu:
        find_biases(kept, [checkpoint.structures[kind] for kind in KINDS], make_stream(), biases, nothing)
        compress_layers(checkpoint, Shape((0, 1, 2), {"neurons": (12,) * 3}, ranks), make_stream(), factors, nothing)
    assert biases.done() == factors.done() == set(kept.layers) and not gpu.faults


# What is broken is found.


def without_a_wait(patch):
    """The host reads hidden states that are on their way."""
    patch.setattr(
        LayerStream, "final_hidden", lambda stream: ((index, stream.keep(found)) for index, found in stream.standing())
    )


def on_another_stream(patch):
    original = LayerReader._with_weights

    def copied(reader, number, weights):
        with torch.cuda.stream(torch.cuda.Stream()):
            return original(reader, number, weights)

    patch.setattr(LayerReader, "_with_weights", copied)


def in_one_buffer(patch):
    """Pinned memory is used again while it is being copied."""
    original = LayerReader._with_weights

    def reused(reader, number, weights):
        layer = original(reader, number, weights)
        for weight in weights.values():
            weight.zero_()
        return layer

    patch.setattr(LayerReader, "_with_weights", reused)


@pytest.mark.parametrize("breaks", [None, without_a_wait, on_another_stream, in_one_buffer])
def test_uses_that_nothing_keeps_apart_are_found(tmp_path, monkeypatch, breaks):
    make_stream = stream_in(tmp_path)
    if breaks is not None:
        breaks(monkeypatch)
    with pretended_gpu() as gpu:
        write_dense_states(make_stream(), tmp_path, nothing)
    assert bool(gpu.faults) == (breaks is not None)


# Two ranks, with DeepSpeed as it is on GPUs.


def rehearse(folder, breaks, world):
    """Score, measure and train a sharded model; note faults, and waits of the host."""
    world, goals = World(world.rank, world.size, world.size, GPU), ("labels", "distillation", "loraprune")
    checkpoint, windows_ST = open_checkpoint(folder / "model"), windows_of(4)
    accelerator = CUDA_Accelerator()
    accelerator._communication_backend_name = "gloo"
    real_accelerator.set_accelerator(accelerator)
    found = {}
    with pretended_gpu() as gpu:
        if breaks:
            torch.cuda.Stream.wait_stream = lambda _stream, _other: None
        options = {"seed": 0, "world": world, "sharding": "zero3"}
        scorer = ShardScorer(checkpoint, DTYPE, windows_ST, [CRITERIA["entropy"]], **options)
        scorer.score([range(number, number + 1) for number in range(3)])
        with counting(gpu):
            scorer.score([range(3, 4)])
        found["entropy"] = gpu.waits.copy()
        model = FrozenModel(checkpoint, DTYPE, "zero3", world)
        for window_T in windows_ST:
            with counting(gpu):
                model.final_hidden(window_T)
        found["fidelity"] = gpu.waits.copy()
        for goal in goals if not breaks else ():
            training = Trainer(task_of(checkpoint, goal), Snapshot(), world, Placement(False, False, True))
            training.step(0)
            training.step(1)
            with counting(gpu):
                training.step(2)
            found[goal] = gpu.waits.copy()
    if world.is_first:
        (folder / "found.json").write_text(json.dumps({"faults": gpu.faults, "waits": found}))


# DeepSpeed itself waits for the GPU at the end of what gathers a head, or a layer whose units LoRAPrune scores.
SHARDED = {"entropy": 3, "fidelity": 0, "labels": 2, "distillation": 3, "loraprune": 6}


@pytest.mark.parametrize("breaks", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_sharded_models(tmp_path, breaks):
    save_tiny(tmp_path / "model", "llama", dtype=DTYPE, hidden_size=256, intermediate_size=416, num_hidden_layers=3)
    assert on_ranks(2, partial(rehearse, tmp_path, breaks)) == [0, 0]
    found = json.loads((tmp_path / "found.json").read_text())
    assert bool(found["faults"]) == breaks
    counts = {name: sum(waits.values()) for name, waits in found["waits"].items()}
    assert breaks or counts == SHARDED, found["waits"]


@pytest.mark.parametrize("fails_at", [None, 1])
def test_weights_are_read_by_a_thread_whose_errors_are_those_of_whoever_asks(tmp_path, monkeypatch, fails_at):
    checkpoint = checkpoint_in(tmp_path / "model")
    alone, reader = (LayerReader(checkpoint, DTYPE, device) for device in (CPU, GPU))
    threads, read, seen = set(), reader._weights, []

    def weights(number):
        threads.add(threading.get_ident())
        if number == fails_at:
            raise OSError("stale file handle")
        return read(number)

    monkeypatch.setattr(reader, "_weights", weights)
    with pretended_gpu(), pytest.raises(OSError, match="stale") if fails_at else contextlib.nullcontext():
        for number, layer in reader.layers((0, 1, 2)):
            seen.append(number)
            expected = alone.layer(number).state_dict()
            assert all(torch.equal(weight.cpu(), expected[name]) for name, weight in layer.state_dict().items())
    assert seen == list(range(fails_at or 3)) and len(threads - {threading.get_ident()}) == 1

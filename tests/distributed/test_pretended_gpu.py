"""Scoring, refits and measurements keep tensors of a GPU, here a pretended one, apart from those in main memory."""

import contextlib
import threading
from functools import partial

import pytest
import scoring
import torch
from pretended_gpu import CPU, GPU, MixedError, RefusedError, pretended_gpu
from ranks import SoloWorld
from refitting import KINDS, MICRO_BATCH, checkpoint_in, refit, some_kept, to_prune, windows_of

from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.models.single_layer import LayerReader
from hfprune_dist.refit.bias_refit import find_biases
from hfprune_dist.refit.cheap_fits import Scored
from hfprune_dist.refit.low_rank import compress_layers
from hfprune_dist.refit.measurement import PrunedLayers, measure_shapes, run_layers
from hfprune_dist.refit.norms_refit import NormGradients, fit_norms
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.kept import Shape
from hfprune_dist.training.teacher_states import write_dense_states

WORLD, DTYPE = SoloWorld(device=GPU), torch.bfloat16


def nothing(_done):
    pass


def test_what_a_gpu_would_refuse_is_found():
    with pretended_gpu():
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        assert there.device == (there * 2).device == there[torch.tensor([0])].device == here.to(there).device == GPU
        assert there.cpu().device == here.device == torch.device("cpu")
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), there.numpy, lambda: here @ there):
            with pytest.raises(MixedError):
                mixed()
        with pytest.raises(RefusedError):
            there.cumsum(0)


@pytest.mark.parametrize(
    ("variant", "structures", "criteria"),
    [
        ("llama", KINDS, ["surgeon", "entropy", "fisher_signs", "fluctuation", "activation_l1", "weight_taylor"]),
        ("qwen3", KINDS[:1], ["coupled_taylor", "magnitude"]),
    ],
)
def test_importance(tmp_path, variant, structures, criteria):
    stage = scoring.make_stage(tmp_path, variant, "bfloat16", criteria, structures)
    store = Store(tmp_path / "store")
    with pretended_gpu():
        scoring.run(store, stage, WORLD)
    assert store.handle(stage.id).is_committed()


@pytest.mark.parametrize(
    ("method", "variant"), [("dense", "llama"), ("layerwise", "llama"), ("block", "qwen3"), ("dense", "gpt_oss")]
)
def test_refits(tmp_path, method, variant):
    checkpoint, kept = to_prune(tmp_path / "model", variant, (0, 2))
    with pretended_gpu():
        fitted = refit(method, checkpoint, kept, tmp_path / "refit", world=WORLD, windows_ST=windows_of(5), dtype=DTYPE)
    assert fitted.done() == set(kept.layers)


def stream_in(folder, variant="llama", size=MICRO_BATCH):
    return partial(LayerStream, checkpoint_in(folder / "model", variant), windows_of(5), DTYPE, size, WORLD)


def dense_states(stream):
    run_layers(stream, stream.reader.layers(range(stream.num_layers)), nothing)
    return dict(stream.final_hidden())


def test_measurements(tmp_path):
    checkpoint, make_stream = checkpoint_in(tmp_path / "model"), stream_in(tmp_path)
    units = [checkpoint.structures[kind] for kind in KINDS]
    kinds = [Scored(it, [torch.arange(count).double() for count in it.counts]) for it in units]
    shapes = [
        Shape((0, 1), {"neurons": (11, 24), "kv_groups": (2, 4)}),
        Shape((0, 1, 2), {"neurons": (24, 13, 9), "kv_groups": (4, 1, 3)}),
    ]
    with pretended_gpu():
        kls = measure_shapes(shapes, kinds, make_stream(), make_stream(), dense_states(make_stream()), nothing)
        assert all(kl > 0 for kl in kls)


def test_refits_of_norms(tmp_path):
    checkpoint, make_stream = checkpoint_in(tmp_path / "model", "qwen3"), stream_in(tmp_path, "qwen3")
    with pretended_gpu():
        dense, stream = dense_states(make_stream()), make_stream()
        pruned = PrunedLayers(checkpoint, some_kept([0, 2]), {}, stream.reader)
        factors_RC, kls = fit_norms(NormGradients(pruned, stream, dense, nothing))
        assert factors_RC.device.type == "cpu"
    assert min(kls) < kls[0]


def test_biases_low_ranks_and_references(tmp_path):
    checkpoint, make_stream, kept = checkpoint_in(tmp_path / "model"), stream_in(tmp_path), some_kept((0, 1, 2))
    ranks = dict.fromkeys(checkpoint.family.attention_modules[:2], (8, 8, 8))
    biases, factors = (RefittedLayers(checkpoint, tmp_path / name) for name in ("biases", "factors"))
    with pretended_gpu():
        find_biases(kept, [checkpoint.structures[kind] for kind in KINDS], make_stream(), biases, nothing)
        compress_layers(checkpoint, Shape((0, 1, 2), {"neurons": (12,) * 3}, ranks), make_stream(), factors, nothing)
        (tmp_path / "states").mkdir()
        write_dense_states(make_stream(), tmp_path / "states", WORLD, nothing)
    assert biases.done() == factors.done() == set(kept.layers)


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
            assert all(torch.equal(it.cpu(), expected[name]) for name, it in layer.state_dict().items())
    assert seen == list(range(fails_at or 3)) and len(threads - {threading.get_ident()}) == 1

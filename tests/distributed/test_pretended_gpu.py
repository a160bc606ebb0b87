"""Scoring, refits and measurements keep tensors of a GPU, here a pretended one, apart from those in main memory."""

from functools import partial

import pytest
import scoring
import torch
from pretended_gpu import GPU, MixedError, pretended_gpu
from ranks import SoloWorld
from refitting import KINDS, MICRO_BATCH, checkpoint_in, refit, some_kept, to_prune, windows_of

from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.refit.bias_refit import find_biases
from hfprune_dist.refit.candidates import CheapFits, Scored
from hfprune_dist.refit.low_rank import LowRankLayers, Sizes, compress_layers
from hfprune_dist.refit.measurement import Measurement, dense_outputs, one_by_one
from hfprune_dist.refit.norms_refit import NormGradients, PrunedLayers, fit_norms
from hfprune_dist.store.artifacts import Store
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


def test_measurements(tmp_path):
    checkpoint, windows_ST = checkpoint_in(tmp_path / "model"), windows_of(5)
    units = [checkpoint.structures[kind] for kind in KINDS]
    kinds = [Scored(it, [torch.arange(count).double() for count in it.counts]) for it in units]
    judged = one_by_one(windows_ST[:2])
    with pretended_gpu():
        measurement = Measurement(
            checkpoint,
            lambda: CheapFits(kinds, LayerStream(checkpoint, windows_ST, DTYPE, MICRO_BATCH, WORLD), WORLD),
            judged,
            reference=lambda: dense_outputs(checkpoint, judged, DTYPE, WORLD, nothing),
            dtype=DTYPE,
            world=WORLD,
            after_each=nothing,
        )
        assert all(kl > 0 for kl in measurement.kl([((11, 2), (24, 4), None), ((24, 4), (13, 1), (9, 3))]))


@pytest.mark.parametrize("variant", ["llama-tied-biases", "qwen3"])
def test_refits_of_norms(tmp_path, variant):
    checkpoint, batches = checkpoint_in(tmp_path / "model", variant), dict(enumerate(windows_of(5).split(MICRO_BATCH)))
    with pretended_gpu():
        dense = dense_outputs(checkpoint, batches, DTYPE, WORLD, nothing)
        pruned = PrunedLayers(checkpoint, some_kept([0, 2]), {}, DTYPE, GPU)
        gradients = NormGradients(pruned, batches, dense, world=WORLD, after_each=nothing)
        fit = fit_norms(gradients)
        assert fit.factors_RC.device.type == "cpu"
    assert min(fit.kl) < fit.kl[0]


def test_biases_low_ranks_and_references(tmp_path):
    checkpoint, windows_ST, kept = checkpoint_in(tmp_path / "model"), windows_of(5), some_kept((0, 1, 2))
    ranks = dict.fromkeys(checkpoint.family.attention_modules[:2], 8)
    with pretended_gpu():
        where = windows_ST, DTYPE, MICRO_BATCH, WORLD
        stream = partial(LayerStream, checkpoint, *where)
        kinds = [checkpoint.structures[kind] for kind in KINDS]
        biases = SavedLayers(tmp_path / "biases", kept.layers)
        find_biases(checkpoint, kept, kinds, stream(), biases, WORLD, nothing)
        layers = LowRankLayers(checkpoint, list(ranks), tmp_path / "ranks")
        compress_layers(checkpoint, Sizes(12, ranks), stream(), layers, WORLD, nothing)
        (tmp_path / "states").mkdir()
        write_dense_states(stream(), tmp_path / "states", WORLD, nothing)
    assert biases.done() == layers.done() == set(kept.layers)

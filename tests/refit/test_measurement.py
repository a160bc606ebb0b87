"""Divergences of shapes and of refitted models: against whole models, on any ranks, and if outputs are not numbers."""

import pytest
import torch
from ranks import SoloWorld
from refitting import KINDS, MICRO_BATCH, NEURONS, checkpoint_in, nothing, windows_of
from transformers import AutoModelForCausalLM
from worlds import Ranks

from hfprune_dist.core.selection import top_units
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.errors import UserError
from hfprune_dist.refit.cheap_fits import Scored, cheap_fits, kept_of
from hfprune_dist.refit.measurement import mean_divergences, measure_shapes
from hfprune_dist.structures.kept import Shape

WINDOWS = windows_of(3)
SHAPES = [
    Shape((0, 1, 2), {"neurons": (24, 24, 24), "kv_groups": (4, 4, 4)}),
    Shape((1, 2), {"neurons": (24, 5), "kv_groups": (4, 1)}),
    Shape((0, 1), {"neurons": (24, 9), "kv_groups": (4, 3)}),
    Shape((0, 1, 2), {"neurons": (24, 9, 7), "kv_groups": (4, 3, 2)}),
]


def scored(checkpoint):
    generator = torch.Generator().manual_seed(0)
    structures = [checkpoint.structures[kind] for kind in KINDS]
    return [Scored(it, [torch.rand(count, generator=generator) for count in it.counts]) for it in structures]


def stream_of(checkpoint, world, windows_ST=WINDOWS, dtype=torch.float32, size=1):
    return LayerStream(checkpoint, windows_ST, dtype, size, world)


def dense_states(checkpoint, world, dtype=torch.float32):
    stream = stream_of(checkpoint, world, dtype=dtype)
    stream.run_layers(nothing)
    return dict(stream.final_hidden())


def measured(checkpoint, world, dtype=torch.float32, every=1):
    passed, dense = [], dense_states(checkpoint, world, dtype)
    stream = stream_of(checkpoint, world, dtype=dtype)
    kls = measure_shapes(SHAPES, scored(checkpoint), None, stream, dense, passed.append, every=every)
    assert passed == [1, 2, 3]
    return kls


def by_whole_models(checkpoint, shapes, every=1):
    models = [AutoModelForCausalLM.from_pretrained(checkpoint.path) for _ in range(len(shapes) + 1)]
    kinds = scored(checkpoint)
    for model, shape in zip(models[1:], shapes, strict=True):
        kept, layers = kept_of(kinds, shape), model.model.layers
        for number in shape.layers:
            for it in kinds:
                goes_U = torch.ones(it.units.counts[number], dtype=torch.bool)
                goes_U[kept.of_layer(number, it.units.kind)] = False
                linear = layers[number].get_submodule(it.units.output)
                linear.weight.data[:, goes_U.repeat_interleave(it.units.channels_per_unit)] = 0
        model.model.layers = torch.nn.ModuleList(layers[number] for number in shape.layers)
        model.config.num_hidden_layers = len(shape.layers)
    with torch.no_grad():
        dense, *others = (model(WINDOWS, use_cache=False).logits.log_softmax(-1)[:, ::every] for model in models)
    return [(dense.exp() * (dense - it)).sum(-1).mean().item() for it in others]


@pytest.mark.parametrize(("ranks", "every"), [(1, 1), (2, 2)])
def test_shapes_diverge_as_whole_models_do(tmp_path, ranks, every):
    checkpoint = checkpoint_in(tmp_path / "model")
    expected = by_whole_models(checkpoint, SHAPES, every)
    for kls in Ranks(ranks).run(lambda world: measured(checkpoint, world, every=every)):
        assert kls == pytest.approx(expected, rel=1e-3, abs=1e-6) and min(kls[1:]) > 1e-4


def test_outputs_that_are_nan_are_one_message(tmp_path):
    checkpoint, world = checkpoint_in(tmp_path / "model", layers=2), SoloWorld()
    dense, stream = dense_states(checkpoint, world), stream_of(checkpoint, world)
    strange = {index: it * float("nan") for index, it in stream.states.items()}
    with pytest.raises(UserError, match=r"1 of 2 shapes .* NaN or infinite; .*dtype=float32"):
        mean_divergences(stream, dense, [stream.states, strange])


@pytest.mark.parametrize("size", [1, 3])
def test_every_size_is_fitted_on_dense_activations_whichever_rank_does_it(tmp_path, size):
    checkpoint, counts = checkpoint_in(tmp_path / "model"), (5, 9, 13, 20, NEURONS)
    kinds = scored(checkpoint)[:1]
    name = f"{kinds[0].units.output}.weight"

    def fitted(world):
        stream = stream_of(checkpoint, world, windows_of(9), size=MICRO_BATCH)
        _, layer = next(stream.reader.layers([0]))
        return [cheap_fits(0, layer, kinds, [(count,) for count in counts], it, world) for it in (stream, None)]

    (alone, plain), *_ = Ranks(1).run(fitted)
    ranks = Ranks(size).run(fitted)
    for count in counts:
        kept_K = top_units(kinds[0].scores[0], count)
        assert torch.equal(plain[count,][name], plain[NEURONS,][name][:, kept_K])
        assert torch.equal(alone[count,][name], plain[count,][name]) is (count == NEURONS)
        for made, _ in ranks:
            assert made[count,].keys() == alone[count,].keys()
            torch.testing.assert_close(made[count,][name], alone[count,][name], rtol=1e-4, atol=1e-5)
            assert torch.equal(made[count,][name], ranks[0][0][count,][name])

"""Cheap refits of many sizes: the same on any number of ranks, which send each other tensors, never pickles of them."""

import pytest
import torch
from refitting import MICRO_BATCH, NEURONS, checkpoint_in, refit, some_kept, weights_in, windows_of
from worlds import Ranks

from hfprune_dist.core.selection import top_units
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.refit.cheap_fits import CheapFits, Scored, kept_of
from hfprune_dist.refit.finished_layers import candidates_of
from hfprune_dist.structures.kept import Kept

# Most bytes of an object that is sent: ridges, maxima, shapes, and no weights, the smallest of which is larger.
SMALL = 600


def pickled(ranks):
    """Return the size in bytes of every object that a rank brought to a collective."""
    kinds = ("broadcast from", "all_gather")
    return [call.bytes for log in ranks.logs for call in log if call.kind.startswith(kinds)]


def sent(ranks):
    """Return the size in bytes of every tensor that one rank sent to the others."""
    return [call.bytes for log in ranks.logs for call in log if call.kind.startswith("broadcast_tensor")]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_size_has_the_same_weights_on_all_ranks_and_travels_once(tmp_path, size):
    checkpoint, windows_ST = checkpoint_in(tmp_path / "model"), windows_of(9)
    units, counts = checkpoint.structures["neurons"], (5, 9, 13, 20, NEURONS)
    scores = [torch.randn(NEURONS, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]

    def fitted(world):
        stream = LayerStream(checkpoint, windows_ST, torch.float32, MICRO_BATCH, world)
        fits = CheapFits([Scored(units, scores)], stream, True, world)
        _, layer = next(stream.layers([0]))
        return fits.weights(0, layer, [(count,) for count in counts])

    ranks, alone = Ranks(size), Ranks(1).run(fitted)[0]
    for found in ranks.run(fitted):
        for count in counts:
            name = f"{units.output}.weight"
            assert found[count,].keys() == alone[count,].keys()
            assert all(torch.equal(weight, alone[count,][name]) for name, weight in found[count,].items())
            assert found[count,][name].shape[1] == len(top_units(scores[0], count))
    hidden_size = checkpoint.config["hidden_size"]
    weights = sorted(count * hidden_size * 4 for count in counts[:-1])
    products = [NEURONS * hidden_size * 8] * 2 if size > 1 else []  # with Gram matrices, in float64
    expected = sorted([*weights, *products])
    assert sorted(sent(ranks))[-len(expected) :] == expected
    assert max(pickled(ranks)) < SMALL < min(weights)


def test_candidates_name_what_each_layer_keeps(tmp_path):
    structures = checkpoint_in(tmp_path / "model").structures
    scores = {"neurons": torch.arange(float(NEURONS)), "kv_groups": torch.tensor([3.0, 0.0, 2.0, 1.0])}
    kinds = [Scored(structures[kind], [it, -it, it.flip(0)]) for kind, it in scores.items()]
    kept = kept_of(kinds, ((2, 1), None, (1, 3)))
    assert kept.layers == (0, 2)
    assert [it.tolist() for it in kept.units["neurons"]] == [[NEURONS - 2, NEURONS - 1], [0]]
    assert [it.tolist() for it in kept.units["kv_groups"]] == [[0], [0, 1, 3]]
    assert candidates_of([kept, Kept((1,))], 3) == [((0,), None, (0,)), (None, (1,), None)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("method", ["dense", "layerwise", "block"])
def test_refits_send_no_pickles_of_weights(tmp_path, method, size):
    checkpoint, kept, ranks = checkpoint_in(tmp_path / "model"), some_kept((0, 2)), Ranks(size)
    windows_ST = windows_of(9)
    ranks.run(lambda world: refit(method, checkpoint, kept, tmp_path / "refit", world=world, windows_ST=windows_ST))
    assert weights_in(tmp_path / "refit")
    assert max(pickled(ranks)) < SMALL

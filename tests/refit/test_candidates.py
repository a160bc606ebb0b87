"""Candidates with cheap refits of many sizes, and what each of them keeps."""

import pytest
import torch
from refitting import MICRO_BATCH, NEURONS, checkpoint_in, windows_of
from worlds import Ranks

from hfprune_dist.core.selection import top_units
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.refit.candidates import CheapFits, Scored, candidates_of, kept_of
from hfprune_dist.structures.kept import Kept


@pytest.mark.parametrize("size", [1, 3])
def test_every_size_is_fitted_on_dense_activations_whichever_rank_does_it(tmp_path, size):
    checkpoint, windows_ST, counts = checkpoint_in(tmp_path / "model"), windows_of(9), (5, 9, 13, 20, NEURONS)
    units = checkpoint.structures["neurons"]
    scores = [torch.randn(NEURONS, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    name = f"{units.output}.weight"

    def fitted(world):
        stream = LayerStream(checkpoint, windows_ST, torch.float32, MICRO_BATCH, world)
        _, layer = next(stream.layers([0]))
        made, plain = (
            CheapFits([Scored(units, scores)], it, world).weights(0, layer, [(count,) for count in counts])
            for it in (stream, None)
        )
        return made, plain

    (alone, plain), *_ = Ranks(1).run(fitted)
    ranks = Ranks(size).run(fitted)
    for count in counts:
        kept_K = top_units(scores[0], count)
        assert torch.equal(plain[count,][name], plain[NEURONS,][name][:, kept_K])
        assert torch.equal(alone[count,][name], plain[count,][name]) is (count == NEURONS)
        for made, _ in ranks:
            assert made[count,].keys() == alone[count,].keys()
            torch.testing.assert_close(made[count,][name], alone[count,][name], rtol=1e-4, atol=1e-5)
            assert torch.equal(made[count,][name], ranks[0][0][count,][name])


def test_candidates_name_what_each_layer_keeps(tmp_path):
    structures = checkpoint_in(tmp_path / "model").structures
    scores = {"neurons": torch.arange(float(NEURONS)), "kv_groups": torch.tensor([3.0, 0.0, 2.0, 1.0])}
    kinds = [Scored(structures[kind], [it, -it, it.flip(0)]) for kind, it in scores.items()]
    kept = kept_of(kinds, ((2, 1), None, (1, 3)))
    assert kept.layers == (0, 2)
    assert [it.tolist() for it in kept.units["neurons"]] == [[NEURONS - 2, NEURONS - 1], [0]]
    assert [it.tolist() for it in kept.units["kv_groups"]] == [[0], [0, 1, 3]]
    assert candidates_of([kept, Kept((1,))], 3) == [((0,), None, (0,)), (None, (1,), None)]

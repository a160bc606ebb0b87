"""Second moments of output gradients: what they are on any number of ranks, and who saves them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Ranks

from hfprune_dist.errors import UserError
from hfprune_dist.scoring import layer_sums
from hfprune_dist.scoring.curvature import Curvature


def gradients_of(batch, layer, hidden_size):
    scale_C = 10.0 ** torch.randint(-3, 2, (hidden_size,), generator=torch.Generator().manual_seed(layer))
    return torch.randn(3, hidden_size, generator=torch.Generator().manual_seed(1000 * batch + layer)) * scale_C


def totals_of(world, folder, kinds, sizes):
    """Deal micro-batches out to ranks that go in step: a rank with none left takes part, but doesn't count."""
    batches, layers, hidden_size = sizes
    curvature = Curvature(dict.fromkeys(kinds, (layers, hidden_size)), folder, world)
    for first in range(0, batches, world.size):
        mine = first + world.rank
        see = curvature.seeing(counts=mine < batches)
        for layer in reversed(range(layers)):
            for kind in see:
                see[kind](layer, gradients_of(min(mine, batches - 1), layer, hidden_size))
        if first % (2 * world.size):  # a shard of two micro-batches is over
            curvature.end_shard()
    curvature.end_shard()
    curvature.require_finite()
    curvature.save(batches)
    world.barrier()
    return {(kind, layer): curvature.value(kind, layer, batches) for kind in kinds for layer in range(layers)}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    ranks=st.integers(1, 5),
    batches=st.integers(1, 7),
    layers=st.integers(1, 4),
    hidden_size=st.integers(1, 9),
    kinds=st.sampled_from((("neurons",), ("neurons", "kv_groups"))),
    is_large=st.booleans(),
)
def test_it_is_the_sum_over_all_ranks_tokens(tmp_path_factory, ranks, batches, layers, hidden_size, kinds, is_large):
    """Whether ranks add up their own terms until a shard is over, or are too large for that."""
    folder = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        if is_large:
            patch.setattr(layer_sums, "LAYER_SUMS_BYTES", 0)
        found = Ranks(ranks).run(lambda world: totals_of(world, folder, kinds, (batches, layers, hidden_size)))
    for (kind, layer), total in found[0].items():
        vectors = torch.cat([gradients_of(batch, layer, hidden_size) for batch in range(batches)]).double()
        expected = vectors.T @ vectors
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-6 * float(expected.diagonal().max()))
        assert all(torch.equal(it[kind, layer], total) for it in found)
    assert sorted(file.name for file in (folder / str(batches)).iterdir()) == sorted(
        f"{kind}-{layer}.safetensors" for kind in kinds for layer in range(layers)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_not_finite_names_the_layer_that_backward_met_first(tmp_path, value, layer):
    curvature = Curvature({"neurons": (2, 3)}, tmp_path, SoloWorld())
    for lost in range(layer + 1):
        curvature.seeing(counts=False)["neurons"](lost, torch.full((1, 3), value))
    curvature.require_finite()
    for lost in range(layer + 1):
        curvature.seeing(counts=True)["neurons"](lost, torch.full((1, 3), value))
    with pytest.raises(UserError, match=rf"gradients of neurons in layer {layer} are NaN or infinite"):
        curvature.require_finite()

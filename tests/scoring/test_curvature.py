"""Second moments of output gradients: the same bits on any ranks, who holds what, and what is sent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Ranks

from hfprune_dist.core.exact_sums import ExactOverflowError
from hfprune_dist.core.triangle import packed_size
from hfprune_dist.scoring.curvature import Curvature


def gradients_of(batch, layer, hidden_size):
    scale_C = 10.0 ** torch.randint(-3, 2, (hidden_size,), generator=torch.Generator().manual_seed(layer))
    return torch.randn(3, hidden_size, generator=torch.Generator().manual_seed(1000 * batch + layer)) * scale_C


def add_all(world, curvature, batches, layers, hidden_size):
    """Deal micro-batches out to ranks that go in step: a rank with none left takes part, but doesn't count."""
    for first in range(0, batches, world.size):
        mine = first + world.rank
        see = curvature.seeing(counts=mine < batches)
        for layer in reversed(range(layers)):
            for kind in see:
                see[kind](layer, gradients_of(min(mine, batches - 1), layer, hidden_size))
        curvature.check()


def totals_of(world, folder, kinds, sizes):
    batches, layers, hidden_size = sizes
    curvature = Curvature(dict.fromkeys(kinds, (layers, hidden_size)), batches, folder, world)
    add_all(world, curvature, batches, layers, hidden_size)
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
)
def test_any_number_of_ranks_has_the_bits_of_one(tmp_path_factory, ranks, batches, layers, hidden_size, kinds):
    sizes = batches, layers, hidden_size
    alone = totals_of(SoloWorld(), tmp_path_factory.mktemp("one"), kinds, sizes)
    for layer in range(layers):
        vectors = torch.cat([gradients_of(batch, layer, hidden_size) for batch in range(batches)]).double()
        expected = vectors.T @ vectors
        atol = 1e-5 * float(expected.diagonal().max())
        torch.testing.assert_close(alone[kinds[0], layer], expected, rtol=1e-4, atol=atol)
    folder = tmp_path_factory.mktemp("many")
    for totals in Ranks(ranks).run(lambda world: totals_of(world, folder, kinds, sizes)):
        assert totals.keys() == alone.keys()
        assert all(torch.equal(totals[it], alone[it]) for it in alone)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("hidden_size", [4, 8])
def test_a_micro_batch_sends_each_layers_integers_to_its_owner_and_nothing_else_of_their_size(
    tmp_path, ranks, hidden_size
):
    batches, layers, kinds = 6, 5, ("neurons", "kv_groups")
    world_of = Ranks(ranks)

    def run(world):
        curvature = Curvature(dict.fromkeys(kinds, (layers, hidden_size)), batches, tmp_path, world)
        add_all(world, curvature, batches, layers, hidden_size)
        curvature.save(batches)

    world_of.run(run)
    steps = -(-batches // ranks)
    for log in world_of.logs:
        sent = [call for call in log if call.kind.startswith("reduce")]
        expected = 0 if ranks == 1 else steps * layers * len(kinds)
        assert len(sent) == expected and sum(call.bytes for call in sent) == expected * 8 * packed_size(hidden_size)
        # Once for everything: what determines a layer's scale, from rank 0.
        rest = [call for call in log if call not in sent]
        assert len(rest) == layers * len(kinds) and max(call.bytes for call in rest) <= 8 * hidden_size
    owners = {layer: layer % ranks for layer in range(layers)}
    assert {call.kind.split(",")[0] for log in world_of.logs for call in log if "reduce" in call.kind} == (
        set() if ranks == 1 else {f"reduce {owner}" for owner in owners.values()}
    )
    assert sorted(file.name for file in (tmp_path / str(batches)).iterdir()) == sorted(
        f"{kind}-{layer}.safetensors" for kind in kinds for layer in range(layers)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_out_of_all_proportion_are_refused_once_the_micro_batch_is_over(tmp_path, value, layer):
    curvature = Curvature({"neurons": (2, 3)}, 2, tmp_path, SoloWorld())
    add_all(SoloWorld(), curvature, 1, 2, 3)
    curvature.seeing(counts=False)["neurons"](layer, torch.full((1, 3), value))
    curvature.check()
    curvature.seeing(counts=True)["neurons"](layer, torch.full((1, 3), value))
    with pytest.raises(ExactOverflowError, match=rf"^gradients of neurons in layer {layer}: .* a thousand times"):
        curvature.check()

"""What the refit of a prune stage sees: calibration windows, and copies of them."""

import pytest
import torch
from cuts import IMPORTANCE, prepare, run_solo, weights_of
from hypothesis import given
from hypothesis import strategies as st
from made_stages import stage_of
from worlds import Ranks, run_in_threads

from hfprune_dist.data.windows import load_windows
from hfprune_dist.distributed.sums import HOLD_OUT_EVERY, is_held_out
from hfprune_dist.stages import prune_refit
from hfprune_dist.stages.prune_refit import in_refit_order
from hfprune_dist.store.artifacts import Store


def held_out(windows, size):
    """Positions, among so many windows, of those that refits hold out."""
    return [it for it in range(windows) if is_held_out(it // size, -(-windows // size))]


@given(windows=st.integers(1, 70), copies=st.integers(1, 4), size=st.integers(1, 9))
def test_windows_are_held_out_with_all_their_copies_as_far_as_there_is_room(windows, copies, size):
    """A window's tokens are its number; a copy's are negative."""
    windows_ST, versions = torch.arange(1, windows + 1)[:, None], 1 + copies
    numbers = in_refit_order(windows_ST, -windows_ST[:, None].expand(-1, copies, -1), size)[:, 0].tolist()
    assert sorted(numbers) == sorted([*range(1, windows + 1), *[-it for it in range(1, windows + 1)] * copies])
    assert numbers[0] == 1, "the layers of a model are checked on the first"
    before = {1 + it for it in held_out(windows, size)}
    places = held_out(len(numbers), size)
    apart = [numbers[it] for it in places]
    among = sum(abs(number) in before for number in apart)
    assert among == min(len(apart), len(before) * versions)
    fitted = {abs(number) for place, number in enumerate(numbers) if place not in places}
    on_both_sides = fitted & {abs(number) for number in apart}
    # Those of one side that fill the other are whole windows, but perhaps for one.
    assert len(on_both_sides) <= 1
    if windows % size == 0 and windows // size % HOLD_OUT_EVERY == 0:
        assert not on_both_sides and {abs(number) for number in apart} == before


def test_a_refit_sees_copies_and_makes_other_weights(tmp_path, monkeypatch):
    seen = {}

    def refit_layers(context, models, kept, windows_ST, fitted, *, phase, of=prune_refit.refit_layers):
        seen[context.params.refit_copies] = windows_ST
        of(context, models, kept, windows_ST, fitted, phase=phase)

    monkeypatch.setattr(prune_refit, "refit_layers", refit_layers)
    store, template, _ = prepare(tmp_path, refit="layerwise")
    weights = []
    for copies in (0, 1, 3):
        stage = stage_of(
            "prune",
            "llama",
            {**template.params.to_json(), **({"refit_copies": copies} if copies else {})},
            template.inputs,
        )
        run_solo(store, stage)
        weights.append(weights_of(store, stage))
    assert weights[0] != weights[1] != weights[2] != weights[0]
    windows_ST = load_windows(store.path(IMPORTANCE.id))
    assert torch.equal(seen[0], windows_ST)
    for copies in (1, 3):
        assert len(seen[copies]) == (1 + copies) * len(windows_ST)
        rows = {tuple(row.tolist()) for row in seen[copies]}
        assert len(rows) == len(seen[copies]) and rows >= {tuple(row.tolist()) for row in windows_ST}
    assert {tuple(row.tolist()) for row in seen[1]} <= {tuple(row.tolist()) for row in seen[3]}


@pytest.mark.parametrize(("samples", "ranks"), [(1, 2), (17, 5)])
def test_copies_have_the_same_bits_on_any_number_of_ranks(tmp_path, samples, ranks):
    store, stage, _ = prepare(tmp_path, refit="layerwise", refit_copies=2, samples=samples)
    run_solo(store, stage)
    other = Store(tmp_path / "other")
    other.path(IMPORTANCE.id).parent.mkdir(parents=True)
    other.path(IMPORTANCE.id).symlink_to(store.path(IMPORTANCE.id))
    run_in_threads(other, stage, Ranks(ranks))
    assert weights_of(other, stage) == weights_of(store, stage)

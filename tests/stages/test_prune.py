"""The prune stage: on real ranks, killed, interrupted; its refits, and shapes that the ratio decides."""

import pytest
import shapes
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import INTERRUPTED, Interrupting, finish, killing_in_reduction, metrics_of, on_ranks, run_here, run_stage
from safetensors.torch import load_file
from shapes import outcome

from hfprune_dist.distributed.sums import HOLD_OUT_EVERY, is_held_out
from hfprune_dist.kinds.memory import Passes
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.stages import context
from hfprune_dist.stages.prune_refit import in_refit_order

BOTH = ["neurons", "kv_groups"]


def prepare(folder, variant="llama", **changes):
    """A stage that removes as many neurons of every layer."""
    settings = {"allocation": "uniform", "structures": ["neurons"], "layers": 2}
    return shapes.prepare(folder, variant, **{**settings, **changes})


# Ranks.


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"refit": "dense", "effort": "thorough", "samples": 9}, 3),
        ({"refit": "block", "samples": 24}, 2),
        ({"refit": "bias", "allocation": "local", "structures": BOTH, "protect_first": 0, "protect_last": 0}, 3),
    ],
    ids=["dense", "block", "bias"],
)
def test_refits_rounded_to_bfloat16_are_the_same_on_more_ranks(tmp_path, settings, ranks):
    outcomes = []
    for size in (1, ranks):
        store, stage = prepare(tmp_path / str(size), dtype="bfloat16", **settings)
        ended = on_ranks(size, lambda world, store=store, stage=stage: run_here(store, stage, world))
        assert ended == [0] * size, ended
        outcomes.append(outcome(store, stage))
    assert outcomes[0] == outcomes[1]


# Per layer: sums for least squares on fitted and held-out windows, for curvature, the right side and a length; errors.
REDUCTIONS = 2 * 3 + 4 + 3 + 1 + 3


@pytest.mark.slow
def test_a_block_goes_on_with_the_same_bits_after_one_of_its_ranks_died_in_the_second_layer(tmp_path):
    reference, stage = prepare(tmp_path / "whole", refit="block", samples=24)
    finish(reference, stage, 2)
    store, stage = prepare(tmp_path / "killed", refit="block", samples=24)
    killed = run_stage(store, stage, 2, environment=killing_in_reduction(1, REDUCTIONS + REDUCTIONS // 2))
    assert killed.returncode != 0 and not store.handle(stage.id).artifact.exists()
    assert len(list(store.handle(stage.id).work.glob("refit-*/layer-*.safetensors"))) == 1
    finish(store, stage, 2)
    assert outcome(store, stage) == outcome(reference, stage)


def test_an_interrupted_refit_goes_on_at_its_layer(tmp_path):
    def ended(ranks, store, stage, interruption=None):
        (code,) = {*on_ranks(ranks, lambda world: run_here(store, stage, world, interruption))}
        return code

    settings = {"refit": "dense", "samples": 24, "layers": 3, "dtype": "bfloat16"}
    whole, stage = prepare(tmp_path / "whole", **settings)
    assert ended(1, whole, stage) == 0
    store, stage = prepare(tmp_path / "parts", **settings)
    assert ended(2, store, stage, Interrupting(2)) == INTERRUPTED
    assert len(list(store.handle(stage.id).work.glob("refit-*/layer-*.safetensors"))) == 2
    assert ended(1, store, stage) == 0
    assert outcome(store, stage) == outcome(whole, stage)


# Refits.


@given(windows=st.integers(1, 70), size=st.integers(1, 9))
def test_windows_are_held_out_with_their_copies_as_far_as_there_is_room(windows, size):
    """A window's tokens are its number; its copy's are negative."""

    def held_out(count):
        return [window for window in range(count) if is_held_out(window // size, -(-count // size))]

    windows_ST = torch.arange(1, windows + 1)[:, None]
    numbers = in_refit_order(windows_ST, -windows_ST, size)[:, 0].tolist()
    assert sorted(numbers) == sorted([*range(1, windows + 1), *range(-windows, 0)])
    before = {1 + window for window in held_out(windows)}
    places = held_out(len(numbers))
    apart = [numbers[place] for place in places]
    assert sum(abs(number) in before for number in apart) == min(len(apart), 2 * len(before))
    fitted = {abs(number) for place, number in enumerate(numbers) if place not in places}
    # Those of one side that fill the other are whole windows, but perhaps for one.
    assert len(fitted & {abs(number) for number in apart}) <= 1
    if windows % size == 0 and windows // size % HOLD_OUT_EVERY == 0:
        assert {abs(number) for number in apart} == before and not fitted & before


NORMS = [
    "model.norm",
    *(f"model.layers.{n}.{place}_layernorm" for n in (0, 1) for place in ("input", "post_attention")),
]


def test_refitted_norms_bring_the_distribution_closer_and_nothing_else_changes(tmp_path, monkeypatch):
    """On their own number of windows at once, which isn't what decides the bits of the other refit."""
    tensors, metrics = [], {}
    at_once = iter([shapes.MICRO_BATCH] * 4 + [2 * shapes.MICRO_BATCH])  # of two streams each, and the norms'
    monkeypatch.setattr(context, "passes_here", lambda *_: Passes(next(at_once)))
    for refits in (False, True):
        monkeypatch.setattr(PruneParameters, "refits_norms", refits)
        store, stage = prepare(tmp_path / str(refits), ratio=0.25, refit="layerwise")
        run_here(store, stage)
        tensors.append(load_file(store.handle(stage.id).artifact / "model.safetensors"))
        metrics = metrics_of(store, stage)
    changed = {name for name, tensor in tensors[0].items() if not torch.equal(tensor, tensors[1][name])}
    assert changed == {f"{norm}.weight" for norm in NORMS}
    kls = metrics["norms_kl"]
    assert min(kls) < kls[0] and metrics["norms_held_out_kl"][1] < metrics["norms_held_out_kl"][0]
    assert (metrics["micro_batch_size"], metrics["norms_micro_batch_size"]) == (2, 4)

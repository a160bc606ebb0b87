"""Refitted layers on disk, and what least squares did to the projections of several experts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refitting import KINDS, checkpoint_in, fitted_in

from hfprune_dist.refit.dense_refit import fit_of_all, output_tensors
from hfprune_dist.refit.least_squares_fit import ProjectionFit, Solution
from hfprune_dist.structures.units import Owned

FIT = ProjectionFit(0.1, error_before=0.5, error_after=0.25)
LAYERS = (0, 2)


@pytest.mark.parametrize("refit", ["layerwise", "block"])
def test_what_was_written_is_done_and_replaces_what_it_names(tmp_path, refit):
    fitted = fitted_in(checkpoint_in(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "refit", refit)
    names = ["mlp.down_proj.weight", "self_attn.o_proj.weight"]
    rows = ["mlp.gate_proj.weight", "mlp.up_proj.weight"] if refit == "block" else []
    for number in LAYERS:
        tensors = {**{name: torch.randn(32, 5) for name in names}, **{name: torch.randn(5, 32) for name in rows}}
        fitted.write(number, tensors, dict.fromkeys(KINDS, FIT))
    assert fitted.done() == set(LAYERS) and fitted.reports(LAYERS) == [dict.fromkeys(KINDS, FIT)] * 2
    replacements = fitted.replacements(LAYERS)
    assert set(replacements) == {f"model.layers.{number}.{name}" for number in LAYERS for name in [*names, *rows]}
    stored = replacements["model.layers.2.mlp.down_proj.weight"]()
    assert (stored.shape, stored.dtype) == ((32, 5), torch.bfloat16)
    weights = fitted.weights(2, like=torch.empty(0, dtype=torch.float64))
    assert weights.keys() == {*names, *rows} and torch.equal(weights["mlp.down_proj.weight"], stored.double())
    file = tmp_path / "refit/layer-2.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert fitted.done() == {0} and not file.exists()


SHARES = st.floats(0, 1)


@given(st.lists(st.tuples(st.sampled_from((0.1, 1.0, 10.0)), SHARES, SHARES, st.floats(0, 9)), min_size=1, max_size=5))
def test_the_fit_of_several_projections_is_that_of_their_targets_together(drawn):
    none = torch.empty(0)
    solutions = [Solution(ProjectionFit(ridge, *errors), energy, none, none) for ridge, *errors, energy in drawn]
    energy, whole = sum(it.energy for it in solutions), fit_of_all(solutions)
    if len(solutions) == 1:
        assert whole == solutions[0].fit
        return
    assert whole.ridge == sorted(ridge for ridge, *_ in drawn)[(len(drawn) - 1) // 2]
    assert whole.error_before * energy == pytest.approx(sum(before * energy for _, before, _, energy in drawn))
    assert whole.error_after * energy == pytest.approx(sum(after * energy for _, _, after, energy in drawn))
    assert energy or whole.error_before == whole.error_after == 0.0


@pytest.mark.parametrize(("axis", "shape"), [(1, (2, 5, 3)), (2, (2, 3, 5))])
def test_weights_of_experts_are_stacked_as_the_files_have_them(tmp_path, axis, shape):
    units = checkpoint_in(tmp_path).structures["neurons"]
    stacked = replace(units, columns=(Owned("mlp.experts.down_proj", axis, stacked=True),))
    weights_CK = [torch.randn(3, 5), torch.randn(3, 5)]
    ((name, whole),) = output_tensors(stacked, weights_CK).items()
    assert (name, tuple(whole.shape)) == ("mlp.experts.down_proj", shape)
    assert torch.equal(whole[1] if axis == 2 else whole[1].T, weights_CK[1])
    each = replace(units, columns=(Owned("experts.0.w2", 1, expert=0), Owned("experts.1.w2", 1, expert=1)))
    assert output_tensors(each, weights_CK) == {"experts.0.w2": weights_CK[0], "experts.1.w2": weights_CK[1]}

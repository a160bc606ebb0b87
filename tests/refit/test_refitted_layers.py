"""Refitted layers on disk: those that are missing, damaged or of an earlier version are done again."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refitting import KINDS, checkpoint_in, fitted_in

from hfprune_dist.refit.refitted_layers import FittedProjection, ProjectionFit, fit_of_all, output_tensors
from hfprune_dist.structures.units import Owned

FIT = ProjectionFit(0.1, error_before=0.5, error_after=0.25)
LAYERS = (0, 2)


def written(folder, kinds=KINDS, refit="layerwise"):
    """Write layers of random weights, in a bfloat16 checkpoint."""
    checkpoint = checkpoint_in(folder / "model", dtype=torch.bfloat16)
    fitted = fitted_in(checkpoint, folder / "refit", refit, kinds=kinds)
    for number in LAYERS:
        tensors = {f"{unit.output}.weight": torch.randn(32, 5) for unit in fitted.kinds}
        if refit == "block":
            tensors |= {f"mlp.{name}.weight": torch.randn(5, 32) for name in ("gate_proj", "up_proj")}
        fitted.write(number, tensors, {unit.kind: FIT for unit in fitted.kinds})
    return fitted


@pytest.mark.parametrize("kinds", [KINDS, KINDS[:1]])
@pytest.mark.parametrize("refit", ["layerwise", "block"])
def test_what_was_written_is_done_and_replaces_what_it_names(tmp_path, kinds, refit):
    fitted = written(tmp_path, kinds, refit)
    assert fitted.done(range(3)) == set(LAYERS) and fitted.done([1]) == set()
    assert fitted.reports(LAYERS) == [dict.fromkeys(kinds, FIT)] * 2
    names = ["mlp.down_proj", *(["self_attn.o_proj"] if len(kinds) > 1 else [])]
    names += ["mlp.gate_proj", "mlp.up_proj"] if refit == "block" else []
    replacements = fitted.replacements(LAYERS)
    assert set(replacements) == {f"model.layers.{number}.{name}.weight" for number in LAYERS for name in names}
    stored = replacements["model.layers.2.mlp.down_proj.weight"]()
    assert (stored.shape, stored.dtype) == ((32, 5), torch.bfloat16)
    weights = fitted.weights(2, like=torch.empty(0, dtype=torch.float64))
    assert weights.keys() == {f"{name}.weight" for name in names}
    assert torch.equal(weights["mlp.down_proj.weight"], stored.double())


SHARES = st.floats(0, 1)


@given(st.lists(st.tuples(st.sampled_from((0.1, 1.0, 10.0)), SHARES, SHARES, st.floats(0, 9)), min_size=1, max_size=5))
def test_the_fit_of_several_projections_is_that_of_their_targets_together(drawn):
    fitted = [
        FittedProjection(torch.empty(0), ProjectionFit(ridge, before, after), energy)
        for ridge, before, after, energy in drawn
    ]
    energy, whole = sum(it.energy for it in fitted), fit_of_all(fitted)
    if len(fitted) == 1:
        assert whole == fitted[0].fit
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


@pytest.mark.parametrize(
    "report",
    [
        {"ridge": 0.1, "error_before": 0.5, "error_after": 0.25},  # of an earlier version
        {"neurons": {"ridge": 0.1, "error_before": 0.5, "error_after": 0.25}},
        {"neurons": None, "kv_groups": None},
        {"neurons": {"ridge": 0.1}, "kv_groups": {"ridge": 0.1}},
        [],
        7,
    ],
    ids=str,
)
def test_a_report_that_is_none_of_ours_is_set_aside(tmp_path, report):
    fitted = written(tmp_path)
    (tmp_path / "refit/layer-2.json").write_text(json.dumps(report))
    assert fitted.done(LAYERS) == {0} == fitted.done(LAYERS)
    assert [file.name.startswith("layer-2.json.") for file in (tmp_path / "refit").glob("layer-2.json*")] == [True]


def test_reports_that_are_cut_short_and_weights_that_are_damaged_are_set_aside(tmp_path):
    for number, end in ((0, "json"), (0, "safetensors"), (2, "safetensors")):
        folder = tmp_path / f"{number}.{end}"
        fitted = written(folder)
        file = folder / f"refit/layer-{number}.{end}"
        file.write_bytes(file.read_bytes()[:-5])
        assert fitted.done(LAYERS) == set(LAYERS) - {number}
        assert not file.exists() and len(list(file.parent.glob(f"{file.name}.*"))) == 1


@pytest.mark.parametrize("end", ["json", "safetensors"])
def test_a_layer_that_lacks_a_file_is_not_done(tmp_path, end):
    fitted = written(tmp_path)
    (tmp_path / f"refit/layer-0.{end}").unlink()
    assert fitted.done(LAYERS) == {2}

"""Refitted layers on disk: those that are missing, damaged or of an earlier version are done again."""

import json

import pytest
import torch
from refitting import KINDS, checkpoint_in, fitted_in

from hfprune_dist.refit.refitted_layers import ProjectionFit

FIT = ProjectionFit(0.1, error_before=0.5, error_after=0.25)
LAYERS = (0, 2)


def written(folder, kinds=KINDS, refit="layerwise"):
    """Write layers of random weights, in a bfloat16 checkpoint."""
    checkpoint = checkpoint_in(folder / "model")
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
    assert replacements["model.layers.2.mlp.down_proj.weight"]().shape == (32, 5)


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

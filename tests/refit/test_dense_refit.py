"""Refits on dense activations: least squares of every kind against float64, layers that go, ranks and deaths."""

import pytest
import torch
from faults.kill import deaths_during
from ranks import SoloWorld
from refitting import (
    DOWN,
    MICRO_BATCH,
    O_PROJ,
    checkpoint_in,
    columns,
    embedded,
    found,
    inside,
    held_out_errors,
    is_as_good_as_any,
    refit,
    ridge_regression,
    some_kept,
    to_prune,
    weights_in,
    windows_of,
)
from tiny import VARIANTS
from worlds import Ranks

from hfprune_dist.core.least_squares import RIDGES
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.models.single_layer import part_of


@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_make_their_dense_outputs_of_what_stays(tmp_path, variant):
    """Each on dense activations, whatever else goes; biases stay."""
    checkpoint, kept, windows = checkpoint_in(tmp_path / "model", variant, 4), some_kept((0, 2, 3)), windows_of(16)
    fitted = refit("dense", checkpoint, kept, tmp_path / "refit", world=SoloWorld(), windows_ST=windows)
    fits = dict(zip(kept.layers, fitted.reports(kept.layers), strict=True))
    reader, hidden = embedded(checkpoint, windows)
    for number in range(4):
        layer = reader.layer(number)
        seen = inside(layer, hidden)
        hidden = seen["output"]
        for kind, name in (("neurons", DOWN), ("kv_groups", O_PROJ)) if number in kept.layers else ():
            units, weight, read = checkpoint.structures[kind], part_of(layer, name).weight.data, seen[name][0]
            channels, targets = columns(kept, number, kind, units.channels_per_unit), read @ weight.T
            fit, old = fits[number][kind], weight[:, channels]
            result = found(tmp_path / "refit", number, name)
            assert is_as_good_as_any(fit.ridge, RIDGES, old, read[..., channels], targets)
            expected = ridge_regression(old, read[..., channels].flatten(0, 1), targets.flatten(0, 1), fit.ridge)
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
            lost = [
                ((targets - read[..., channels] @ it.T).square().sum() / targets.square().sum()) for it in (old, result)
            ]
            assert [fit.error_before, fit.error_after] == pytest.approx([float(it) for it in lost], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("model_type", EXPERTS)
@torch.no_grad()
def test_experts_make_their_dense_outputs_on_their_tokens(tmp_path, model_type):
    """Each with an error that counts as much as the router makes of it; few tokens tell little of a ridge."""
    checkpoint, kept = to_prune(tmp_path / "model", model_type, ())
    windows, others = windows_of(8, tokens=6), names_beside_experts(checkpoint)
    fitted = refit("dense", checkpoint, kept, tmp_path / "refit", world=SoloWorld(), windows_ST=windows)
    files = fitted.replacements(kept.layers)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).double()
    definition = Definition(model, None, others)
    model(input_ids=windows)
    for (kind, number), hidden in definition.hidden.items():
        units, (*_, last) = checkpoint.structures[kind], checkpoint.structures[kind].output_columns
        is_of_experts = kind == KIND
        routing = definition.routing[number] if is_of_experts else torch.ones(1, windows.numel()).double()
        reads = (hidden.view(len(routing), windows.numel(), -1) * routing[..., None]).unflatten(1, windows.shape)
        results = written(files, units, number)
        for expert, (read, result) in enumerate(zip(reads, results, strict=True)):
            width = read.shape[-1]
            rows = kept.of_layer(number, kind).chunk(len(reads))[expert] - width * expert
            weight = dense_weights(model, units, number)[expert]
            old, targets = weight[:, rows], read @ weight.T
            found = [
                ridge
                for ridge in RIDGES
                if torch.allclose(
                    result,
                    ridge_regression(old, read[..., rows].flatten(0, 1), targets.flatten(0, 1), ridge),
                    rtol=1e-3,
                    atol=1e-4,
                )
            ]
            assert found, (kind, number, expert)


@pytest.mark.parametrize("variant", ["qwen3", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("samples", [2, 17])
def test_refits_have_the_same_bits_on_any_number_of_ranks(tmp_path, samples, variant):
    checkpoint, kept = to_prune(tmp_path / "model", variant, (1, 2, 4))
    options = {"windows_ST": windows_of(samples), "dtype": torch.bfloat16}
    weights = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        Ranks(ranks).run(lambda world, to=folder: refit("dense", checkpoint, kept, to, world=world, **options))
        weights.append(weights_in(folder))
    assert weights[0] == weights[1] == weights[2] and len(weights[0]) == 6


@pytest.mark.parametrize("variant", ["llama", "glm4_moe"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_waits_is_solved_before_ranks_leave_and_nothing_twice(tmp_path, ranks, variant):
    checkpoint, kept = to_prune(tmp_path / "model", variant, (0, 1, 3))
    options = {"windows_ST": windows_of(2 * MICRO_BATCH)}
    refit("dense", checkpoint, kept, tmp_path / "whole", world=SoloWorld(), **options)

    def interrupted(done):
        if done == 2:
            raise Interrupted

    folder = tmp_path / "refit"
    with pytest.raises(Interrupted):
        Ranks(ranks).run(
            lambda world: refit("dense", checkpoint, kept, folder, world=world, after_each=interrupted, **options)
        )
    half = weights_in(folder)
    assert set(half) == {f"layer-{number}.{end}" for number in (0, 1) for end in ("safetensors", "json")}
    (folder / "layer-0.json").write_text((folder / "layer-0.json").read_text() + " ")  # would be written again
    Ranks(ranks).run(lambda world: refit("dense", checkpoint, kept, folder, world=world, **options))
    (folder / "layer-0.json").write_text((folder / "layer-0.json").read_text()[:-1])
    assert weights_in(folder) == weights_in(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "variant"),
    [("dense", "llama-tied-biases"), ("layerwise", "llama-tied-biases"), ("dense", "qwen2_moe"), ("dense", "gpt_oss")],
)
def test_death_before_every_write_ends_with_the_same_weights(tmp_path, method, variant):
    checkpoint, kept = to_prune(tmp_path / "model", variant, (1,))
    options = {"world": SoloWorld(), "windows_ST": windows_of(6)}
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    whole.mkdir()
    copies.mkdir()
    deaths = deaths_during(lambda: refit(method, checkpoint, kept, whole, **options), whole, copies)
    assert len(deaths) > 3
    for folder in deaths:
        refit(method, checkpoint, kept, folder, **options)
        assert weights_in(folder) == weights_in(whole)

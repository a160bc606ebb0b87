"""Refits on dense activations: every kind of least squares against float64, dropped layers, ranks and deaths."""

import pytest
import torch
from families import EXPERTS
from faults.kill import deaths_during
from mixtures import projections
from ranks import SoloWorld
from refitting import (
    DOWN,
    MICRO_BATCH,
    O_PROJ,
    apart,
    assert_alike,
    best_ridge_regression,
    checkpoint_in,
    columns,
    embedded,
    found,
    held_out_errors,
    in_files,
    inside,
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
    """Each is fitted on dense activations, whatever else goes; biases stay."""
    checkpoint, kept, windows = checkpoint_in(tmp_path / "model", variant, 4), some_kept((0, 2, 3)), windows_of(16)
    refit("dense", checkpoint, kept, tmp_path / "refit", world=SoloWorld(), windows_ST=windows)
    reader, hidden = embedded(checkpoint, windows)
    for number in range(4):
        layer = reader.layer(number)
        seen = inside(layer, hidden)
        hidden = seen["output"]
        for kind, name in (("neurons", DOWN), ("kv_groups", O_PROJ)) if number in kept.layers else ():
            units, weight, read = checkpoint.structures[kind], part_of(layer, name).weight.data, seen[name][0]
            channels = columns(kept, number, kind, units.channels_per_unit)
            expected = best_ridge_regression(weight[:, channels], read[..., channels], read @ weight.T)
            torch.testing.assert_close(found(tmp_path / "refit", number, name), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "samples", "tokens"),
    [
        *((name, 24, 12) for name in EXPERTS),
        ("mixtral", 1, 1),
        ("qwen2_moe", 16, 1),
        ("olmoe", 16, 1),
        ("gpt_oss", 3, 5),
    ],
)
def test_experts_make_their_dense_outputs_on_their_tokens(tmp_path, model_type, samples, tokens):
    """Each is fitted as the router weights it, with the largest ridge where none of its own tokens are held out."""
    checkpoint, kept = to_prune(tmp_path / "model", model_type, ())
    windows = windows_of(samples, tokens=tokens)
    fitted = refit("dense", checkpoint, kept, tmp_path / "refit", world=SoloWorld(), windows_ST=windows)
    files = {name: read().double() for name, read in fitted.replacements(kept.layers).items()}
    for kind, number, expert, weight, read in projections(checkpoint, windows):
        units = checkpoint.structures[kind]
        channels = kept.of_layer(number, kind).chunk(units.experts)[expert] - len(weight[0]) * expert
        old, targets, read_BTK = weight[:, channels], read @ weight.T, read[..., channels]
        result = in_files(files, units, number, expert)
        expected = {
            ridge: ridge_regression(old, read_BTK.flatten(0, 1), targets.flatten(0, 1), ridge) if read.any() else old
            for ridge in RIDGES
        }
        # Sums of one token's squares have float32's rounding, which a small ridge amplifies.
        found = [it for it in RIDGES if (result - expected[it]).norm() <= 1e-6 + 2e-2 * (expected[it] - old).norm()]
        assert found, (kind, number, expert)
        if samples > MICRO_BATCH:
            errors = held_out_errors(RIDGES, old, read_BTK, targets)
            tells = all(it.any() for it in apart(read))
            best = min(errors.values()) * (1 + 1e-3) + 1e-12
            assert any(errors[it] <= best if tells else it == RIDGES[-1] for it in found), (kind, number, expert)


@pytest.mark.parametrize("variant", ["qwen3", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("samples", [2, 17])
def test_refits_agree_on_any_number_of_ranks(tmp_path, samples, variant):
    """Up to rounding, and nothing is solved twice."""
    checkpoint, kept = to_prune(tmp_path / "model", variant, (1, 2, 4))
    options = {"windows_ST": windows_of(samples)}
    whole = refit("dense", checkpoint, kept, tmp_path / "whole", world=SoloWorld(), **options)

    def interrupted(done):
        if done == kept.layers[1] + 1:
            raise Interrupted

    def shared(world, **callback):
        return refit("dense", checkpoint, kept, tmp_path / "shared", world=world, **options, **callback)

    with pytest.raises(Interrupted):
        Ranks(2).run(lambda world: shared(world, after_each=interrupted))
    half = weights_in(tmp_path / "shared")
    assert set(half) == {f"layer-{number}.safetensors" for number in kept.layers[:2]}
    fitted, *_ = Ranks(3).run(shared)
    assert {name: weights_in(tmp_path / "shared")[name] for name in half} == half
    assert_alike(fitted, whole, kept.layers)


@pytest.mark.parametrize(("method", "variant"), [("dense", "qwen2_moe"), ("layerwise", "llama-tied-biases")])
def test_death_before_every_write_ends_with_the_same_weights(tmp_path, method, variant):
    checkpoint, kept = to_prune(tmp_path / "model", variant, (1,))
    options = {"world": SoloWorld(), "windows_ST": windows_of(6)}
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    whole.mkdir()
    copies.mkdir()
    deaths = deaths_during(lambda: refit(method, checkpoint, kept, whole, **options), whole, copies)
    assert len(deaths) > 2
    for folder in deaths:
        refit(method, checkpoint, kept, folder, **options)
        assert weights_in(folder) == weights_in(whole)

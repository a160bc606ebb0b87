"""Layer-by-layer refits: exact maths against whole layers in float64, gaps, ranks, resuming, and what is run."""

import pytest
import torch
from ranks import SoloWorld
from refitting import (
    DOWN,
    O_PROJ,
    assert_alike,
    best_ridge_regression,
    checkpoint_in,
    embedded,
    found,
    inside,
    pruned_layer,
    refit,
    some_kept,
    weights_in,
    windows_of,
)
from worlds import Ranks

from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import part_of, residual_update, run
from hfprune_dist.refit import sequential_refit
from hfprune_dist.refit.sequential_refit import SequentialRefit

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
NORM = "post_attention_layernorm"
LAYERS = 5
# Nothing goes; single layers; several in a row; at the end; at the beginning.
STAYING = [(0, 1, 2, 3, 4), (0, 2, 4), (0, 4), (0, 1), (3, 4), (2,)]


def target(own, missing):
    return (own + missing) / 2


def through(gap, hidden):
    for layer in gap:
        hidden = run(layer, hidden)
    return hidden


def check(folder, number, name, layer, hidden, targets):
    """Check a projection against ridge regression with the ridge that held-out windows choose; install the result."""
    linear = part_of(layer, name)
    if linear.bias is not None:
        targets = targets - linear.bias
    weight, result = linear.weight.data, found(folder, number, name)
    torch.testing.assert_close(result, best_ridge_regression(weight, hidden, targets), **CLOSE)
    before, after = ((targets - hidden @ it.T).square().sum() for it in (weight, result))
    assert after < before
    linear.weight.data = result


def check_all(folder, kept, windows, model):
    """Check that every block of every layer is fitted to what whole layers compute."""
    reader, hidden = embedded(model, windows)
    dense_hidden = through([reader.layer(number) for number in range(kept.layers[0])], hidden)
    following = [*kept.layers[1:], model.num_layers]
    for number, end in zip(kept.layers, following, strict=True):
        whole, layer = reader.layer(number), pruned_layer(reader, number, kept)
        wanted, gap = inside(whole, dense_hidden), [reader.layer(it) for it in range(number + 1, end)]
        dense_hidden = through(gap, wanted["output"])

        own = inside(whole, hidden)[O_PROJ][1]
        check(folder, number, O_PROJ, layer, inside(layer, hidden)[O_PROJ][0], target(own, wanted[NORM][0] - hidden))

        behind = inside(layer, hidden)  # the refitted attention
        residual = behind[NORM][0]
        own = part_of(whole, "mlp")(behind[NORM][1])
        targets = target(through(gap, residual + own) - residual, dense_hidden - residual)
        check(folder, number, DOWN, layer, behind[DOWN][0], targets)
        hidden = run(layer, hidden)


@pytest.mark.parametrize(
    ("variant", "staying"),
    [*(("llama", it) for it in STAYING), ("llama-tied-biases", (0, 1, 3)), ("qwen3", (0, 1, 3))],
    ids=str,
)
def test_blocks_are_fitted_half_way_to_all_that_is_missing_behind_them(tmp_path, variant, staying):
    model, kept, windows = checkpoint_in(tmp_path / "model", variant, LAYERS), some_kept(staying), windows_of(16)
    refit("layerwise", model, kept, tmp_path / "refit", world=SoloWorld(), windows_ST=windows)
    check_all(tmp_path / "refit", kept, windows, model)


def refitted_model(checkpoint, kept, fitted):
    """Return its layers in float64, without refits where there is no ``fitted``."""
    reader, _ = embedded(checkpoint, windows_of(1))
    layers = [pruned_layer(reader, number, kept) for number in kept.layers]
    for number, layer in zip(kept.layers, layers, strict=True) if fitted else ():
        fitted.install(number, layer)
    return layers


@pytest.mark.parametrize("method", ["dense", "layerwise", "block"])
def test_what_is_refitted_is_closer_to_the_dense_model_on_text_that_it_never_saw(tmp_path, method):
    checkpoint, kept = checkpoint_in(tmp_path / "model", "qwen3", 4), some_kept((0, 1, 3))
    options = {"world": SoloWorld(), "windows_ST": windows_of(96)}
    fitted = refit(method, checkpoint, kept, tmp_path / "refit", **options)
    reader, hidden = embedded(checkpoint, windows_of(24, seed=1))
    dense = through([reader.layer(number) for number in range(4)], hidden)
    errors = [
        (through(refitted_model(checkpoint, kept, it), hidden) - dense).square().sum().item() for it in (None, fitted)
    ]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("method", ["layerwise", "block"])
@pytest.mark.parametrize("samples", [2, 13])
def test_refits_agree_on_any_number_of_ranks(tmp_path, method, samples):
    """Up to rounding. Two samples make one micro-batch, so all ranks but one have nothing to do."""
    checkpoint, kept = checkpoint_in(tmp_path / "model", "llama-tied-biases", 4), some_kept((0, 2, 3))
    options = {"windows_ST": windows_of(samples)}
    whole = refit(method, checkpoint, kept, tmp_path / "whole", world=SoloWorld(), **options)
    first, *_ = Ranks(3).run(lambda world: refit(method, checkpoint, kept, tmp_path / "shared", world=world, **options))
    assert_alike(first, whole, kept.layers)


def test_a_layer_that_does_more_than_add_its_blocks_is_refused_before_it_is_written(tmp_path, monkeypatch):
    checkpoint, kept = checkpoint_in(tmp_path / "model", "qwen3", 3), some_kept((0, 1, 2))

    def of_one_percent(layer, units, output):
        return residual_update(layer, units, output) * (1.01 if units.kind == "neurons" else 1)

    monkeypatch.setattr(sequential_refit, "residual_update", of_one_percent)
    place = r"in layer 0, the inputs of post_attention_layernorm plus the outputs of mlp.down_proj depart from .* by "
    with pytest.raises(UserError, match=place + r".* \(rounding explains 0.0001\)"):
        refit("layerwise", checkpoint, kept, tmp_path / "refit", world=SoloWorld(), windows_ST=windows_of(4))
    assert not weights_in(tmp_path / "refit")


@pytest.mark.parametrize("method", ["layerwise", "block"])
def test_an_interrupted_refit_goes_on_at_its_layer(tmp_path, monkeypatch, method):
    checkpoint, kept = checkpoint_in(tmp_path / "model", "qwen2", 5), some_kept((1, 2, 4))
    options = {"world": SoloWorld(), "windows_ST": windows_of(10)}
    refit(method, checkpoint, kept, tmp_path / "whole", **options)
    fitted, original = [], SequentialRefit._fit
    monkeypatch.setattr(
        SequentialRefit, "_fit", lambda self, number, *rest: fitted.append(number) or original(self, number, *rest)
    )

    def interrupted(done):
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        refit(method, checkpoint, kept, tmp_path / "refit", **options, after_each=interrupted)
    for _ in range(2):
        refit(method, checkpoint, kept, tmp_path / "refit", **options)
        assert fitted == [1, 2, 4]
    assert weights_in(tmp_path / "refit") == weights_in(tmp_path / "whole")

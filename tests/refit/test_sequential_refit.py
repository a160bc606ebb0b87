"""Layer-by-layer refits: exact maths against whole layers in float64, gaps, ranks, resuming, and what is run."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import tiny
import torch
from pairs import change_families
from ranks import SoloWorld
from refitting import (
    DOWN,
    MICRO_BATCH,
    O_PROJ,
    checkpoint_in,
    embedded,
    found,
    inside,
    is_as_good_as_any,
    pruned_layer,
    refit,
    ridge_regression,
    some_kept,
    weights_in,
    windows_of,
)
from tiny import VARIANTS
from transformers import Olmo2Config, Olmo2ForCausalLM
from transformers.models.llama import modeling_llama
from worlds import Ranks

from hfprune_dist.core.least_squares import RIDGES, LeastSquares
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import part_of, run
from hfprune_dist.refit import refitted_layers
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


def check(folder, number, name, layer, hidden, targets, fit):
    """Check a projection against ridge regression with the ridge that held-out windows choose; install the result."""
    linear = part_of(layer, name)
    if linear.bias is not None:
        targets = targets - linear.bias
    weight = linear.weight.data
    assert is_as_good_as_any(fit.ridge, RIDGES, weight, hidden, targets)
    expected = ridge_regression(weight, hidden.flatten(0, 1), targets.flatten(0, 1), fit.ridge)
    result = found(folder, number, name)
    torch.testing.assert_close(result, expected, **CLOSE)
    errors = [((targets - hidden @ it.T).square().sum() / targets.square().sum()).item() for it in (weight, result)]
    assert [fit.error_before, fit.error_after] == pytest.approx(errors, rel=1e-3)
    assert fit.error_after < fit.error_before
    linear.weight.data = result


def check_all(folder, kept, fits, windows, model):
    """Check that every block of every layer is fitted to what whole layers compute."""
    reader, hidden = embedded(model, windows)
    dense_hidden = through([reader.layer(number) for number in range(kept.layers[0])], hidden)
    following = [*kept.layers[1:], model.num_layers]
    for number, end, fit in zip(kept.layers, following, fits, strict=True):
        whole, layer = reader.layer(number), pruned_layer(reader, number, kept)
        wanted, gap = inside(whole, dense_hidden), [reader.layer(it) for it in range(number + 1, end)]
        dense_hidden = through(gap, wanted["output"])

        own = inside(whole, hidden)[O_PROJ][1]
        targets = target(own, wanted[NORM][0] - hidden)
        check(folder, number, O_PROJ, layer, inside(layer, hidden)[O_PROJ][0], targets, fit["kv_groups"])

        behind = inside(layer, hidden)  # the refitted attention
        residual = behind[NORM][0]
        own = part_of(whole, "mlp")(behind[NORM][1])
        targets = target(through(gap, residual + own) - residual, dense_hidden - residual)
        check(folder, number, DOWN, layer, behind[DOWN][0], targets, fit["neurons"])
        hidden = run(layer, hidden)


@pytest.mark.parametrize(
    ("variant", "staying"), [*(("llama", it) for it in STAYING), *((it, (0, 1, 3)) for it in VARIANTS)], ids=str
)
def test_blocks_are_fitted_half_way_to_all_that_is_missing_behind_them(tmp_path, variant, staying):
    model, kept, windows = checkpoint_in(tmp_path / "model", variant, LAYERS), some_kept(staying), windows_of(16)
    fitted = refit("layerwise", model, kept, tmp_path / "refit", world=SoloWorld(), windows_ST=windows)
    fits = fitted.reports(staying)
    check_all(tmp_path / "refit", kept, fits, windows, model)


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


def test_attention_makes_the_refit_better_than_neurons_alone_do(tmp_path):
    """This also holds where no group goes."""
    checkpoint, windows = checkpoint_in(tmp_path / "model", "llama", 3), windows_of(96)
    kept = some_kept((0, 1, 2))
    kept.units["kv_groups"][:] = [torch.arange(4)] * 3
    alone = some_kept((0, 1, 2), kinds=["neurons"])
    options = {"world": SoloWorld(), "windows_ST": windows}
    both = refit("layerwise", checkpoint, kept, tmp_path / "both", **options)
    neurons = refit("layerwise", checkpoint, alone, tmp_path / "neurons", **options)
    reader, hidden = embedded(checkpoint, windows_of(24, seed=1))
    dense = through([reader.layer(number) for number in range(3)], hidden)
    errors = [
        (through(refitted_model(checkpoint, kept, it), hidden) - dense).square().sum().item() for it in (neurons, both)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_nothing_is_solved_twice_however_many_ranks_there_are(tmp_path, monkeypatch, ranks):
    """Each ridge is solved by one rank, and so is the whole problem with the ridge that is found; meanwhile another one
    computes the error without a refit.
    """
    counts = {"weight": Counter(), "error": Counter()}
    for name, count in counts.items():
        original = getattr(LeastSquares, name)

        def counted(self, argument, count=count, original=original):
            count[threading.get_ident()] += 1
            return original(self, argument)

        monkeypatch.setattr(LeastSquares, name, counted)
    checkpoint, kept = checkpoint_in(tmp_path / "model", layers=3), some_kept((0, 2))
    Ranks(ranks).run(
        lambda world: refit("layerwise", checkpoint, kept, tmp_path / "refit", world=world, windows_ST=windows_of(9))
    )
    projections = 2 * len(kept.layers)
    solved, errors = (count.values() for count in counts.values())
    assert sum(solved) == projections * (len(RIDGES) + 1)
    assert max(solved) == projections * (-(-len(RIDGES) // ranks) + 1)
    assert sum(errors) == projections * (len(RIDGES) + 2)
    assert max(errors) == projections * (-(-len(RIDGES) // ranks) + (2 if ranks == 1 else 1))


@pytest.mark.parametrize("method", ["layerwise", "block"])
@pytest.mark.parametrize("samples", [2, 13])
def test_refits_have_the_same_bits_on_any_number_of_ranks(tmp_path, method, samples):
    """Two samples make one micro-batch, so all ranks but one have nothing to do."""
    checkpoint, kept = checkpoint_in(tmp_path / "model", "llama-tied-biases", 4), some_kept((0, 2, 3))
    options = {"windows_ST": windows_of(samples), "dtype": torch.bfloat16}
    weights = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        Ranks(ranks).run(lambda world, to=folder: refit(method, checkpoint, kept, to, world=world, **options))
        weights.append(weights_in(folder))
    assert weights[0] == weights[1] == weights[2] and len(weights[0]) == 6


@pytest.mark.parametrize("method", ["layerwise", "block"])
def test_an_interrupted_refit_goes_on_at_its_layer(tmp_path, monkeypatch, method):
    """It is interrupted after each layer, and between the two files of each layer."""
    checkpoint, kept = checkpoint_in(tmp_path / "model", "qwen2", 5), some_kept((1, 2, 4))
    options = {"world": SoloWorld(), "windows_ST": windows_of(10)}
    whole = refit(method, checkpoint, kept, tmp_path / "whole", **options)
    fitted, original = [], SequentialRefit._fit
    monkeypatch.setattr(
        SequentialRefit, "_fit", lambda self, number, *rest: fitted.append(number) or original(self, number, *rest)
    )

    def interrupted(done):
        raise Interrupted

    for place, number in enumerate(kept.layers):
        folder = tmp_path / str(number)
        stops = {"after_each": lambda done, number=number: done > number and interrupted(done)}
        with pytest.raises(Interrupted):
            refit(method, checkpoint, kept, folder, **options, **stops)
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(refitted_layers, "write_json", lambda *_: interrupted(0))
            refit(method, checkpoint, kept, folder, **options)
            interrupted(0)  # after everything was done
        refit(method, checkpoint, kept, folder, **options)
        again = kept.layers[place + 1 : place + 2]
        assert fitted == [*kept.layers[: place + 1], *again, *kept.layers[place + 1 :]]
        assert weights_in(folder) == weights_in(tmp_path / "whole")
        fitted.clear()
    assert whole.done(kept.layers) == set(kept.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kinds", [("neurons",), ("neurons", "kv_groups")])
def test_no_part_of_a_layer_is_run_for_nothing(tmp_path, monkeypatch, kinds, dtype):
    """Parts run for every layer and micro-batch; one more window passes through a dense layer to check its sum."""
    runs = []
    for kind, part in (("attention", modeling_llama.LlamaAttention), ("mlp", modeling_llama.LlamaMLP)):
        original = part.forward
        monkeypatch.setattr(
            part, "forward", lambda *args, f=original, k=kind, **named: runs.append(k) or f(*args, **named)
        )
    checkpoint, kept = checkpoint_in(tmp_path / "model", "llama", 4), some_kept((1, 2, 3), kinds=kinds)
    options = {"world": SoloWorld(), "windows_ST": windows_of(10), "dtype": dtype}
    for undone in ((1, 2, 3), (2,), ()):
        for number in undone:
            (tmp_path / f"refit/layer-{number}.json").unlink(missing_ok=True)
        refit("layerwise", checkpoint, kept, tmp_path / "refit", **options)
        gone = 1 if undone else 0  # the first layer, only in the dense model
        passed = max(undone, default=0)  # by both models, and checked on one window
        fits = len(undone)  # need the dense block on the pruned stream, and what the pruned output projection reads
        whole = 3 in undone  # layer 3 keeps all groups, so that both output projections read the same
        attention = gone + 2 * passed + (2 * fits - whole if "kv_groups" in kinds else 0)
        mlp = gone + 2 * passed + 2 * fits
        assert runs.count("attention") == 10 // MICRO_BATCH * attention + passed
        assert runs.count("mlp") == 10 // MICRO_BATCH * mlp + passed
        runs.clear()


def test_dense_layers_that_another_refit_has_checked_are_not_checked_again(tmp_path, monkeypatch):
    checked, original = [], LayerStream.require_residual

    def noted(self, *arguments):
        checked.append(self._done)
        original(self, *arguments)

    monkeypatch.setattr(LayerStream, "require_residual", noted)
    checkpoint, residual = checkpoint_in(tmp_path / "model", layers=5), set()
    for staying, expected in [((1, 2), [1, 2]), ((0, 2, 4), [0, 4])]:
        options = {"world": SoloWorld(), "windows_ST": windows_of(4), "residual": residual}
        refit("layerwise", checkpoint, some_kept(staying), tmp_path / f"{staying}", **options)
        assert checked == expected and residual >= {*staying}
        checked.clear()


def test_norms_behind_the_attention_are_refused_before_anything_is_fitted(tmp_path, monkeypatch):
    names = {"attention_norm": "post_feedforward_layernorm", "attention_norm_after": None}
    names |= {"mlp_norm": "post_attention_layernorm", "mlp_norm_after": None, "whole_groups": ""}
    change_families(monkeypatch, lambda family: replace(family, **names))
    monkeypatch.setitem(tiny.VARIANTS, "olmo2", (Olmo2Config, Olmo2ForCausalLM, {"tie_word_embeddings": False}))
    checkpoint = checkpoint_in(tmp_path / "model", "olmo2")
    with pytest.raises(
        UserError, match=r"in layer 0, the inputs of post_feedforward_layernorm plus the outputs of self"
    ):
        refit(
            "layerwise", checkpoint, some_kept((0, 1)), tmp_path / "refit", world=SoloWorld(), windows_ST=windows_of(4)
        )
    assert not (tmp_path / "refit").exists()

"""Least squares on output projections: against float64 and the tokens themselves, dropped layers, ranks and deaths."""

import pytest
import torch
from faults.kill import deaths_during
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import projections
from ranks import SoloWorld
from refitting import (
    DOWN,
    MICRO_BATCH,
    NEURONS,
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

from hfprune_dist.core.least_squares import RIDGES, LeastSquares, Projection
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import part_of
from hfprune_dist.refit.cheap_fits import Scored, cheap_fits
from hfprune_dist.refit.output_refit import Problems, TargetSums, solve, solve_together


@pytest.mark.parametrize("variant", VARIANTS)
def test_projections_make_their_dense_outputs_of_what_stays(tmp_path, variant):
    """Each is fitted on dense activations, whatever else goes. Outputs are compared: where as many channels stay as
    there are tokens, weights are not unique but for the ridge.
    """
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
            made = read[..., channels] @ found(tmp_path / "refit", number, name).T
            torch.testing.assert_close(made, read[..., channels] @ expected.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model_type", "samples", "tokens"),
    [
        *((name, 24, 12) for name in ("qwen3_moe", "deepseek_v3", "gpt_oss")),
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


def problems(weight_CD, fitted_ND, held_out_ND, kept):
    return Problems(*(Projection(weight_CD, it.T @ it).keeping(kept) for it in (fitted_ND, held_out_ND)))


def solution(weight_CD, hidden_ND, kept, ridge):
    """Return the kept columns by least squares on tokens, with further rows that pull towards the old columns."""
    return ridge_regression(weight_CD[:, kept], hidden_ND[:, kept], hidden_ND @ weight_CD.T, ridge)


def lost(weight_CD, hidden_ND, kept, new_CK):
    target_NC = hidden_ND @ weight_CD.T
    return ((target_NC - hidden_ND[:, kept] @ new_CK.double().T).square().sum() / target_NC.square().sum()).item()


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def resolved(problems, *, scarce=False):
    solution, outcome = solve(problems, scarce=scarce)
    assert outcome.isfinite().all()
    return solution


@settings(max_examples=30)
@given(st.data(), st.integers(0, 1000))
def test_a_fit_is_least_squares_with_the_ridge_that_is_best_on_held_out_tokens(data, seed):
    channels, hidden = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 4))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, channels - 1), min_size=1, max_size=channels - 1))))
    mixing_DD = drawn(seed, channels, channels)  # makes channels depend on each other
    fitted, held_out = (drawn(seed + n, data.draw(st.integers(1, 30)), channels) @ mixing_DD for n in (1, 2))
    weight_CD, whole = drawn(seed + 3, hidden, channels), torch.cat([fitted, held_out])
    found = resolved(problems(weight_CD, fitted, held_out, kept))
    errors = [lost(weight_CD, held_out, kept, solution(weight_CD, fitted, kept, ridge)) for ridge in RIDGES]
    # Equally good ones may be taken for each other.
    best = [ridge for ridge, error in zip(RIDGES, errors, strict=True) if error <= min(errors) * (1 + 1e-6) + 1e-9]
    both = [[solution(weight_CD, tokens, kept, ridge) for tokens in (fitted, whole)] for ridge in best]
    assert any(
        all(torch.allclose(it.double(), those, 1e-3, 1e-5) for it, those in zip(found, pair, strict=True))
        for pair in both
    )


WEIGHT, KEPT = drawn(1, 3, 6), torch.tensor([0, 2, 5])
TOKENS, NONE = drawn(2, 20, 6), torch.zeros(4, 6, dtype=torch.float64)


def test_an_expert_without_tokens_to_choose_a_ridge_by_stays_close_to_what_it_was():
    both = problems(WEIGHT, TOKENS, drawn(3, 10, 6), KEPT)
    assert torch.equal(resolved(both, scarce=True).whole_CK, resolved(both).whole_CK)
    expected = solution(WEIGHT, TOKENS, KEPT, max(RIDGES))
    for parts in ((TOKENS, NONE), (NONE, TOKENS)):
        torch.testing.assert_close(resolved(problems(WEIGHT, *parts, KEPT), scarce=True).whole_CK, expected)
    silent = resolved(problems(WEIGHT, NONE, NONE, KEPT), scarce=True)
    assert torch.equal(silent.whole_CK, WEIGHT[:, KEPT])


@pytest.mark.parametrize("ranks", [2, 7])
def test_ranks_find_together_what_one_finds(ranks):
    """There may be more of them than ridges."""
    both = problems(WEIGHT, TOKENS, drawn(3, 10, 6), KEPT)
    alone = resolved(both)
    for solved in Ranks(ranks).run(lambda world: solve_together(both, world)):
        assert torch.equal(solved.fitted_CK, alone.fitted_CK) and torch.equal(solved.whole_CK, alone.whole_CK)


@pytest.mark.parametrize("ranks", [1, 3])
def test_any_targets_are_fitted_as_a_projections_own_outputs_are(ranks):
    batches = TOKENS.float().split(4)
    expected = problems(WEIGHT.float(), *(torch.cat([*it]) for it in (batches[:-1], batches[-1:])), KEPT)

    def work(world):
        sums = TargetSums(0, WEIGHT[:, KEPT].float(), len(batches), world)
        for index in range(world.rank, len(batches), world.size):
            sums.add(index, batches[index][:, KEPT], batches[index] @ WEIGHT.float().T)
        return resolved(sums.of_all_ranks())

    for solved in Ranks(ranks).run(work):
        torch.testing.assert_close(solved, resolved(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["dense", "layerwise", "cheap"])
def test_every_fit_names_the_layer_whose_gram_matrix_is_rounding_errors(tmp_path, monkeypatch, method):
    checkpoint, kept, windows_ST, world = (
        checkpoint_in(tmp_path / "model"),
        some_kept((0, 1)),
        windows_of(5),
        SoloWorld(),
    )

    original = LeastSquares.solved
    unresolved = torch.tensor(1)

    def cheap_fit():
        stream = LayerStream(checkpoint, windows_ST, torch.float32, MICRO_BATCH, world)
        _, layer = next(stream.reader.layers([0]))
        scored = Scored(checkpoint.structures["neurons"], [torch.ones(NEURONS)])
        cheap_fits(0, layer, [scored], [(11,)], stream, world)

    monkeypatch.setattr(LeastSquares, "solved", lambda *problem: (original(*problem)[0], unresolved))
    with pytest.raises(UserError, match=r"^activations of layer 0: .* in rounding; check the checkpoint's weights$"):
        if method == "cheap":
            cheap_fit()
        else:
            refit(method, checkpoint, kept, tmp_path / "fitted", world=world, windows_ST=windows_ST)


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

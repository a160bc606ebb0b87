import pytest
import torch

from hfprune_dist.core.least_squares import RIDGES, Projection, best_ridge

D, C, T = 12, 5, 300


def activations(seed=0, tokens=T):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64) @ mix


WEIGHT = torch.randn(C, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KEPT = torch.tensor([0, 2, 3, 7, 8, 11])


def test_without_a_ridge_it_is_least_squares():
    hidden = activations()
    refitted, _ = Projection(WEIGHT, hidden.T @ hidden).keeping(KEPT).solved(ridge=0.0)
    expected = torch.linalg.lstsq(hidden[:, KEPT], hidden @ WEIGHT.T).solution.T
    torch.testing.assert_close(refitted, expected)


def test_error_is_the_lost_share_of_the_outputs_energy():
    hidden = activations()
    problem = Projection(WEIGHT, hidden.T @ hidden).keeping(KEPT)
    new, _ = problem.solved(1e-2)
    output, pruned = hidden @ WEIGHT.T, hidden[:, KEPT] @ new.T
    expected = (output - pruned).square().sum() / output.square().sum()
    assert problem.error(new) == pytest.approx(expected.item())
    assert expected < problem.error(WEIGHT[:, KEPT])


@pytest.mark.parametrize(("coupling", "smallest"), [(1 + 5e-4, 1e-3), (1.5, 1.0)])
def test_a_larger_ridge_does_where_a_smaller_one_drowns_in_rounding_errors(coupling, smallest):
    gram = torch.eye(D, dtype=torch.float64)
    gram[0, 2] = gram[2, 0] = coupling
    problem = Projection(WEIGHT, gram).keeping(KEPT)
    held_out = Projection(WEIGHT, torch.eye(D, dtype=torch.float64)).keeping(KEPT)
    ridges = [ridge for ridge in RIDGES if ridge >= smallest]
    best, among_those = best_ridge(problem, held_out), best_ridge(problem, held_out, ridges)
    assert (best.ridge, best.error) == (among_those.ridge, among_those.error)
    assert best_ridge(problem, held_out, RIDGES[: -len(ridges)]).error.isinf()


@pytest.mark.parametrize("silent", ["activations", "outputs"])
def test_a_silent_mlp_stays_as_it_is(silent):
    """For example, layers that were added with zero weights."""
    weight_CD, gram_DD, kept = torch.randn(4, 6), torch.eye(6, dtype=torch.float64), torch.tensor([0, 2, 5])
    (gram_DD if silent == "activations" else weight_CD).zero_()
    problem = Projection(weight_CD, gram_DD).keeping(kept)
    best = best_ridge(problem, problem)
    assert torch.equal(best.weight_CK, weight_CD[:, kept].double())
    assert problem.error(problem.solved(best.ridge)[0]) == 0.0


def test_held_out_tokens_choose_more_ridge_where_samples_are_few():
    def chosen(tokens):
        few, held_out = activations(seed=3, tokens=tokens), activations(seed=4)
        fitted, judge = (
            Projection(WEIGHT, hidden.T @ hidden / len(hidden)).keeping(KEPT) for hidden in (few, held_out)
        )
        best = best_ridge(fitted, judge, ridges=(1e-6, 1e-2, 1e-1))
        assert torch.equal(best.weight_CK, fitted.solved(best.ridge)[0]) and best.error == judge.error(best.weight_CK)
        return best.ridge

    assert chosen(tokens=7) > chosen(tokens=3000)


def test_problems_of_two_parts_of_the_tokens_make_that_of_all():
    hidden = activations()
    parts = (hidden[:200], hidden[200:])
    fitted, held_out = (Projection(WEIGHT, part.T @ part).keeping(KEPT) for part in parts)
    mixed, whole = fitted.with_tokens_of(held_out), Projection(WEIGHT, hidden.T @ hidden).keeping(KEPT)
    torch.testing.assert_close(mixed.solved(1e-2), whole.solved(1e-2))
    assert mixed.error(WEIGHT[:, KEPT]) == pytest.approx(whole.error(WEIGHT[:, KEPT]))
    torch.testing.assert_close(mixed.gram_KK, whole.gram_KK)

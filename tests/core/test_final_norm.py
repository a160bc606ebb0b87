"""Newton's method for the factors on a final norm, against autograd in float64."""

import pytest
import torch

from hfprune_dist.core import final_norm
from hfprune_dist.core.final_norm import Place, best_factors, newton_step

C, V, T = 5, 11, 40


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ONES = torch.ones(C, dtype=torch.float64)
HEAD, STATES = drawn(V, C, seed=0), drawn(T, C, seed=1)


def divergence(factors, logits):
    """Mean of KL(p || q) over tokens, p from ``logits``."""
    log_p, log_q = logits.log_softmax(-1), ((STATES * factors) @ HEAD.T).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def visits_by(logits):
    def visit(factors):
        gradient, curvature = (of(divergence)(factors, logits) for of in (torch.func.grad, torch.func.hessian))
        step = newton_step(factors, gradient, curvature)
        return Place(divergence(factors, logits).item(), step, -0.5 * (gradient @ step).item())

    return visit


def fitted(logits):
    return best_factors(visits_by(logits), ONES)[0]


@pytest.fixture(autouse=True)
def _until_it_ends(monkeypatch):
    monkeypatch.setattr(final_norm, "PASSES", 20)
    monkeypatch.setattr(final_norm, "LITTLE", 1e-12)


def test_steps_end_where_the_divergence_is_smallest(monkeypatch):
    monkeypatch.setattr(final_norm, "RIDGE", 0.0)
    wanted = 1 + 0.5 * drawn(C, seed=2)
    torch.testing.assert_close(fitted((STATES * wanted) @ HEAD.T), wanted)


@pytest.mark.parametrize("ridge", [0.3, 1e6])
def test_the_ridge_pulls_factors_together_and_not_towards_one(monkeypatch, ridge):
    monkeypatch.setattr(final_norm, "RIDGE", ridge)
    torch.testing.assert_close(fitted((STATES * 0.6) @ HEAD.T), torch.full((C,), 0.6, dtype=torch.float64))
    apart = fitted((STATES * (1 + 0.5 * drawn(C, seed=2))) @ HEAD.T)
    assert bool(apart.std() < 1e-4) is (ridge > 1)


def test_a_step_that_leads_away_is_followed_by_a_shorter_one():
    """A model that is sure of everything has hardly any curvature."""
    factors, kls = best_factors(visits_by(STATES @ HEAD.T / 5), 10 * ONES)
    assert max(kls) > kls[0] and min(kls) < 0.01 * kls[0]
    torch.testing.assert_close(factors, ONES / 5, rtol=0.1, atol=0)


@pytest.mark.parametrize("worse", [1e12, float("nan")])
def test_a_step_may_lead_away_as_far_as_it_likes(worse):
    kls = iter([0.01, worse, worse, 0.001])
    factors, found = best_factors(lambda _factors: Place(kl := next(kls), ONES, gain=0.5 if kl > 0.001 else 0.0), ONES)
    assert len(found) == 4 and torch.equal(factors, ONES * (1 + final_norm.SHORTER**2))


def test_passes_end_with_little_to_gain(monkeypatch):
    monkeypatch.setattr(final_norm, "LITTLE", 0.9)
    assert len(best_factors(visits_by((STATES * (1 + 0.5 * drawn(C, seed=2))) @ HEAD.T), ONES)[1]) < 5


def test_outputs_that_nothing_depends_on_stay_as_they_are():
    nothing = torch.zeros(C, C, dtype=torch.float64)
    assert not newton_step(drawn(C, seed=3), nothing[0], nothing).any()
    assert torch.equal(best_factors(lambda _factors: Place(0.0, nothing[0], 0.0), ONES)[0], ONES)

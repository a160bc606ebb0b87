"""L-BFGS, on functions whose minimum is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.core import quasi_newton
from hfprune_dist.core.quasi_newton import QuasiNewton


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CURVATURE = drawn(12, seed=9).exp()


def bowl(size, seed, condition=10.0):
    """Return a quadratic function with a drawn minimum, and this minimum; its value there is 1."""
    axes = torch.linalg.qr(drawn(size, size, seed=seed))[0]
    curvature = axes @ torch.diag(torch.linspace(1, condition, size, dtype=torch.float64)) @ axes.T
    minimum = 1 + 0.1 * drawn(size, seed=seed + 1)

    def at(place):
        away = place - minimum
        return 1 + 0.5 * float(away @ curvature @ away), curvature @ away

    return at, minimum


def started(size):
    return QuasiNewton(torch.ones(size, dtype=torch.float64), 7 * CURVATURE[:size])


def searched(function, size):
    search = started(size)
    while not search.is_over:
        search.tell(*function(search.candidate_P))
    return search


@pytest.fixture
def _until_it_ends(monkeypatch):
    monkeypatch.setattr(quasi_newton, "PASSES", 100)
    monkeypatch.setattr(quasi_newton, "LITTLE", 1e-14)


@settings(max_examples=25)
@given(size=st.integers(1, 12), seed=st.integers(0, 99))
@pytest.mark.usefixtures("_until_it_ends")
def test_it_ends_at_the_minimum(size, seed):
    at, minimum = bowl(size, seed)
    torch.testing.assert_close(searched(at, size).best_P, minimum, rtol=0, atol=1e-5)


def test_steps_are_those_of_the_formula_with_matrices(monkeypatch):
    """The inverse of the second derivatives, written out as a matrix: equation 7.16 of the source, from a diagonal."""
    monkeypatch.setattr(quasi_newton, "LITTLE", 0.0)
    at, _ = bowl(6, seed=3)
    search, places = started(6), []
    for _ in range(4):
        places.append(search.candidate_P)
        search.tell(*at(search.candidate_P))
    assert search.values == sorted(search.values, reverse=True)  # all steps led down, so all are remembered
    gradients = [at(place)[1] for place in places]
    pairs = [(b - a, d - c) for a, b, c, d in zip(places, places[1:], gradients, gradients[1:], strict=False)]
    step, change = pairs[-1]
    diagonal = torch.diag(1 / CURVATURE[:6])
    inverse = diagonal * (step @ change) / (change @ diagonal @ change)
    for step, change in pairs:
        projection = torch.eye(6, dtype=torch.float64) - torch.outer(step, change) / (step @ change)
        inverse = projection @ inverse @ projection.T + torch.outer(step, step) / (step @ change)
    torch.testing.assert_close(search.candidate_P, places[-1] - inverse @ gradients[-1])


@pytest.mark.parametrize("worse", [1.5, 1e300, float("inf"), float("nan")])
def test_a_step_that_leads_up_is_followed_by_a_shorter_one_from_the_same_place(worse):
    search = started(4)
    search.tell(1.0, drawn(4, seed=0))
    step = search.candidate_P - 1
    search.tell(worse, torch.full((4,), float("nan"), dtype=torch.float64))
    torch.testing.assert_close(search.candidate_P, 1 + quasi_newton.SHORTER * step)
    assert torch.equal(search.best_P, torch.ones(4, dtype=torch.float64)) and not search.is_over


def test_a_function_that_bends_the_other_way_is_followed_downwards(monkeypatch):
    monkeypatch.setattr(quasi_newton, "LITTLE", 0.0)
    search = searched(lambda place: (2 - float(place @ place), -2 * place), 3)
    assert search.values == sorted(search.values, reverse=True) and len(search.values) == quasi_newton.PASSES


def test_it_ends_where_there_is_nothing_to_gain():
    flat = searched(lambda place: (0.0, torch.zeros_like(place)), 3)
    assert flat.values == [0.0] and torch.equal(flat.best_P, torch.ones(3, dtype=torch.float64))
    hardly = searched(lambda place: (1 + 1e-4 * float(place.sum()), torch.full_like(place, 1e-4)), 3)
    assert len(hardly.values) == 1

"""LoRAPrune's scores compared with the weight's own gradient, and its schedule for any number of steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.methods.loraprune import PARTS, TINY, Factors, gone_after, masks_after, unit_scores

STEPS = st.one_of(st.integers(1, 120), st.integers(1, 200_000))


@st.composite
def weights(draw):
    """Draw a seed, units, entries of a unit, the other dimension, and the axis along which units are consecutive."""
    return *(draw(st.integers(1, most)) for most in (1000, 6, 4, 7)), draw(st.integers(0, 1))


@given(weights(), st.floats(0.1, 4.0))
def test_where_the_factors_span_the_gradient_units_are_scored_by_weight_times_gradient(drawn, scale):
    """A is orthogonal and square, as large as the weight is wide, and B is 0: then g_B A is the whole gradient."""
    seed, units, per_unit, other, axis = drawn
    generator = torch.Generator().manual_seed(seed)
    shape = (units * per_unit, other) if axis == 0 else (other, units * per_unit)
    weight, x = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, (9, shape[1])))
    a = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)).Q
    b = torch.zeros(shape[0], shape[1], dtype=torch.float64)
    for leaf in (weight, a, b):
        leaf.requires_grad_()
    ((x @ (weight + scale * b @ a).T) ** 3).sum().backward()
    factors = Factors(a.detach(), b.detach(), a.grad, b.grad / scale, scale)

    products = (weight * weight.grad).detach().abs()
    terms = products if axis == 0 else products.T
    expected = terms.reshape(units, -1).sum(1)
    torch.testing.assert_close(factors.gradient(), weight.grad)
    scores = unit_scores(weight.detach(), factors, axis, per_unit)
    torch.testing.assert_close(scores, expected / (expected.norm() + TINY))


def test_what_is_scored_is_the_weight_with_the_adapter():
    """A weight that the adapter cancels scores 0; scores that are all 0 cause no division by 0."""
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    cancelled = -0.5 * b @ a
    cancelled[0] += 1
    scores = unit_scores(cancelled, Factors(a, b, torch.ones_like(a), torch.ones_like(b), 0.5), 0, 1)
    assert scores[0] == pytest.approx(1) and scores[1:].max() < 1e-12
    still = Factors(a, b, torch.zeros_like(a), torch.zeros_like(b), 0.5)
    assert torch.equal(unit_scores(cancelled, still, 0, 1), torch.zeros(4, dtype=torch.float64))


@given(units=st.integers(1, 5), per_unit=st.integers(1, 3), parts=st.integers(1, 3))
def test_parts_of_a_matrix_are_scored_as_matrices_of_their_own(units, per_unit, parts):
    height = units * per_unit
    weight, grad_b, b = (torch.randn(parts * height, size, dtype=torch.float64) for size in (5, 2, 2))
    a, grad_a = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    together = unit_scores(weight, Factors(a, b, grad_a, grad_b, 0.5), 0, per_unit, parts)
    rows = [slice(part * height, (part + 1) * height) for part in range(parts)]
    apart = [unit_scores(weight[it], Factors(a, b[it], grad_a, grad_b[it], 0.5), 0, per_unit) for it in rows]
    torch.testing.assert_close(together, torch.stack(apart).sum(0))


@given(total=STEPS, gone=st.integers(1, 20_000), data=st.data())
def test_any_number_of_steps_reaches_all_and_loses_no_unit_twice(total, gone, data):
    step = data.draw(st.integers(1, total))
    assert gone_after(total, total, gone) == gone and masks_after(total, total)
    here = gone_after(step, total, gone)
    assert 0 <= here <= gone_after(min(step + 1, total), total, gone) <= gone
    if PARTS * step <= total:
        assert here == 0
    elif PARTS * step > (PARTS - 1) * total:
        assert here == gone
    else:
        left = 1 - (step - 0.1 * total) / (0.8 * total)
        assert here == pytest.approx(gone * (1 - left**3), abs=0.501)

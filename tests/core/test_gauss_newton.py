from contextlib import nullcontext

import pytest
import torch
from pretended_gpu import pretended_gpu
from torch.nn.functional import gelu, linear, silu

from hfprune_dist.core.gauss_newton import (
    DAMPING,
    Biases,
    GaussNewtonSums,
    Linearized,
    MlpWeights,
    solve_normal_equations,
)
from hfprune_dist.core.gram import ridge_of
from hfprune_dist.core.portions import wide_product

K, C, N = 7, 5, 60


def some(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = MlpWeights.of(*(torch.randn(*shape, generator=generator) for shape in ((K, C), (K, C), (C, K))))
    return weights, torch.randn(N, C, generator=generator)


def curvature_of(at, weights):
    *rows, inputs = at.curvature()
    return GaussNewtonSums(tuple(rows), inputs, at.hidden_NK.T @ at.hidden_NK, len(at.hidden_NK), weights)


def solved(at, weights, right, iterations):
    def length(change):
        return at.forward(change).square().sum().item()

    return solve_normal_equations(
        lambda v: at.backward(at.forward(v)), length, right, curvature_of(at, weights), iterations
    )


def mlp(weights, biases, x):
    rows = [x @ row.T for row in weights.rows_KC]
    gate, *up = [row if bias is None else row + bias for row, bias in zip(rows, biases.rows_K, strict=True)]
    return (biases.activation(gate) * (up[0] if up else 1)) @ weights.down_CK.T


@pytest.mark.parametrize(
    "biases",
    [Biases(), Biases((torch.linspace(-1, 1, K), torch.linspace(1, 2, K))), Biases(activation=gelu)],
    ids=["none", "biases", "gelu"],
)
def test_products_with_the_jacobian_are_those_of_autograd(biases):
    weights, x = some()
    change, error = some(1)[0], torch.randn(N, C, generator=torch.Generator().manual_seed(2))
    at = Linearized(weights, biases, x)
    torch.testing.assert_close(at.output(), mlp(weights, biases, x))
    _, moved = torch.func.jvp(
        lambda *tensors: mlp(MlpWeights.of(*tensors), biases, x), weights.tensors(), change.tensors()
    )
    torch.testing.assert_close(at.forward(change), moved, rtol=1e-4, atol=1e-4)
    _, pull = torch.func.vjp(lambda *tensors: mlp(MlpWeights.of(*tensors), biases, x), *weights.tensors())
    for found, expected in zip(at.backward(error).tensors(), pull(error), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_inverse_is_that_of_each_block():
    """With derivatives that don't depend on the token, because biases are so large that no input matters."""
    weights, x = some()
    biases = Biases((torch.full((K,), 40.0), torch.linspace(100, 200, K)))
    small = MlpWeights.of(*(1e-3 * row for row in weights.rows_KC), weights.down_CK)
    at, change = Linearized(small, biases, x), some(1)[0]
    inverse = curvature_of(at, small).inverse()(change)
    jacobian = torch.func.jacrev(lambda *t: mlp(MlpWeights.of(*t), biases, x), argnums=(0, 1))(*small.tensors())
    energy, places = (
        x.square().mean(0),
        zip(jacobian, change.tensors()[:2], inverse.tensors()[:2], small.rows_KC, strict=True),
    )
    for derivative, before, found, row in places:
        blocks = [rows.T @ rows for rows in derivative.flatten(0, 1).unbind(1)]
        traces = torch.stack([block.trace() for block in blocks])
        ridges = ridge_of(DAMPING, traces, row.square().sum(1))
        for neuron, block in enumerate(blocks):
            damped = block + block.trace() / energy.sum() * ridge_of(DAMPING, energy).diag()
            damped = damped * (1 + ridges[neuron] / traces[neuron])
            torch.testing.assert_close(damped @ found[neuron], before[neuron], rtol=1e-2, atol=1e-2)
    gram = at.hidden_NK.T @ at.hidden_NK
    damped = gram + ridge_of(DAMPING, gram.diagonal(), small.down_CK.square().sum(0)).diag()
    torch.testing.assert_close(inverse.down_CK @ damped, change.down_CK, rtol=1e-2, atol=1e-2)


def test_conjugate_gradients_solve_the_damped_equations():
    weights, x = some()
    at = Linearized(weights, Biases(), x)
    target = mlp(some(3)[0], Biases(), x)
    right = at.backward(target - at.output())
    change = solved(at, weights, right, iterations=200)
    left, damping = at.backward(at.forward(change)), curvature_of(at, weights).damping()
    for a, b, v, d in zip(left.tensors(), right.tensors(), change.tensors(), damping.tensors(), strict=True):
        torch.testing.assert_close(a + d * v, b, rtol=1e-3, atol=1e-2)


def test_a_step_changes_the_same_function_in_any_units_of_the_activations():
    weights, x = some()
    factor_K = torch.logspace(-3, 3, K)
    gate_KC, up_KC = weights.rows_KC
    changed = MlpWeights.of(gate_KC, factor_K[:, None] * up_KC, weights.down_CK / factor_K)
    target, moved = mlp(some(3)[0], Biases(), x), []
    for start in (weights, changed):
        at = Linearized(start, Biases(), x)
        step = solved(at, start, at.backward(target - at.output()), iterations=4)
        moved.append(mlp(start.plus(step), Biases(), x))
    torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-3)
    assert (moved[0] - target).norm() < 0.9 * (mlp(weights, Biases(), x) - target).norm()


def test_a_silent_mlp_is_left_alone():
    """Its activations are 0, and its down projection of 0 passes nothing back."""
    weights, x = some()
    silent = MlpWeights.of(*(torch.zeros_like(weight) for weight in weights.tensors()))
    at = Linearized(silent, Biases(), x)
    right = at.backward(torch.ones(len(x), silent.down_CK.shape[0], dtype=x.dtype))
    step = solved(at, silent, right, iterations=5)
    assert all(torch.equal(change, torch.zeros_like(change)) for change in step.tensors())


def relative_error(found, expected):
    return ((found.cpu().double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_in_bfloat16_only_what_each_token_has_is_rounded(device):
    """Sums over tokens are those in float64 up to float32's rounding, also of float32 targets; 0.4 % otherwise."""
    (weights, x), error = some(), torch.randn(N, C, generator=torch.Generator().manual_seed(2))
    weights, x, wide = weights.to(torch.bfloat16), x.bfloat16(), weights.to(torch.bfloat16).to(torch.float64)
    with nullcontext() if device == "cpu" else pretended_gpu():
        moved = MlpWeights.of(*(tensor.to(device) for tensor in weights.tensors()))
        at = Linearized(moved, Biases(), x.to(device))
        found, hidden_NK = at.backward(error.to(device)), at.hidden_NK.cpu().double()
        cross_CK = wide_product(error.to(device), at.hidden_NK).cpu()
    assert {tensor.dtype for tensor in found.tensors()} == {torch.float32}
    assert relative_error(found.down_CK, error.bfloat16().double().T @ hidden_NK) < 1e-6
    assert relative_error(cross_CK, error.double().T @ hidden_NK) < 1e-5
    expected = Linearized(wide, Biases(), x.double()).backward(error.double())
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert relative_error(ours, theirs) < 5e-3


def test_in_float32_the_bits_are_those_of_plain_products():
    (weights, x), error = some(), torch.randn(N, C, generator=torch.Generator().manual_seed(2))
    found, (gate, up) = Linearized(weights, Biases(), x).backward(error), weights.rows_KC
    gate_NK, up_NK, back_NK = linear(x, gate), linear(x, up), error @ weights.down_CK
    slope_NK = gate_NK.sigmoid() * (1 + gate_NK * (1 - gate_NK.sigmoid()))
    products = (back_NK * (slope_NK * up_NK)).T @ x, (back_NK * silu(gate_NK)).T @ x, error.T @ (silu(gate_NK) * up_NK)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.tensors(), products, strict=True))

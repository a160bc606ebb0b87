"""Inputs and gradients observed at linear layers give the gradients of their weights, as float64 autograd has them."""

import copy

import pytest
import torch
from core_definition import ROWS, cross_entropy
from scored_model import checkpointed, some_windows, sums_of
from tiny import tiny_model

from hfprune_dist.core.linear_observer import SeenLinear
from hfprune_dist.models.memory_efficient_backward import use_memory_efficient_backward

NAMES = [name for output, rows in ROWS.items() for name in (*rows, output)]
OTHERS = ["entropy", "cross_entropy", "surgeon", "activation_l1"]


def gradients_of(model, windows, criteria=("weight_taylor",), names=NAMES, **options):
    """(layer, name) -> sum over windows of dL/dW, where L is a window's mean cross-entropy; and all sums of units."""
    gradients = {}

    def seeing(key):
        def see(inputs_BTI, gradients_BTO):
            assert inputs_BTI.dim() == gradients_BTO.dim() == 3
            gradients[key] = gradients.get(key, 0) + gradients_BTO.flatten(0, 1).T @ inputs_BTI.flatten(0, 1)

        return see

    def linears(model):
        places = [(number, name) for number in range(model.config.num_hidden_layers) for name in names]
        return [SeenLinear(model.model.layers[place[0]].get_submodule(place[1]), seeing(place)) for place in places]

    sums = sums_of(model, windows, criteria, linears=linears, **options)["neurons"]
    return gradients, sums.of_units


@pytest.mark.parametrize("variant", ["llama-tied-biases", "qwen3"])
def test_gradients_are_those_of_autograd(variant):
    model, windows = tiny_model(variant), some_windows(3, 16)
    found, _ = gradients_of(model, windows)
    exact = copy.deepcopy(model).double().requires_grad_()
    for window in windows:
        cross_entropy(exact(input_ids=window[None]).logits[0], window).backward()
    assert found.keys() == {(number, name) for number in range(2) for name in NAMES}
    for (number, name), gradient in found.items():
        expected = exact.model.layers[number].get_submodule(name).weight.grad
        assert (gradient - expected).norm() < 1e-4 * expected.norm(), (number, name)


@pytest.mark.parametrize(
    ("prepare", "options"), [(use_memory_efficient_backward, {"hidden_act": "gelu"}), (checkpointed, {})]
)
def test_checkpointing_and_criteria_and_weights_beside_change_no_bits(prepare, options):
    model, windows = tiny_model(num_hidden_layers=3, **options), some_windows(3, 16)
    alone, _ = gradients_of(model, windows, names=[name for name in NAMES if "mlp" in name])
    beside, sums = gradients_of(model, windows, ("weight_taylor", *OTHERS), prepare=prepare)
    nothing, expected = gradients_of(model, windows, OTHERS, prepare=prepare)
    assert len(alone) == 9 and all(torch.equal(beside[key], gradient) for key, gradient in alone.items())
    assert sums.keys() == expected.keys() and all(torch.equal(sums[name], summed) for name, summed in expected.items())
    assert not nothing, "of linear layers that no criterion needs"
